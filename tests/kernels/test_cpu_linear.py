"""Quantized and bfloat16 linear layers of the CPU kernels against their definition in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels import cpu
from lmdeploy.kernels.reference import basic
from tests.kernels.cpu_targets import TARGETS, running

TOKENS = (1, 2, 3, 8, 13, 64, 512)


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.manual_seed(0)
    with running(request.param):
        yield request.param


@pytest.fixture
def native() -> Iterator[None]:
    torch.manual_seed(0)
    with running("native"):
        yield


def affine(n: int, k: int, bits: int, group: int, kind: str = "minimum") -> tuple[Tensor, Tensor, Tensor]:
    """q, scales, mins of a random weight whose offsets are stored as `kind`."""
    q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scales = (torch.rand(n, k // group) * 0.1 + 0.01).half().float()
    if kind == "minimum":
        return q, scales, (-torch.rand(n, k // group)).half().float()
    if kind == "wide":
        return q, scales * 1.0001, -torch.rand(n, k // group)
    if kind == "zeros":
        return q, scales, -torch.randint(0, 2**bits, (n, k // group)).float() * scales
    return q, scales, -float(2 ** (bits - 1)) * scales


def dequantize(q: Tensor, scales: Tensor, mins: Tensor) -> Tensor:
    groups = q.double().view(len(q), scales.shape[1], -1)
    return (groups * scales.double()[..., None] + mins.double()[..., None]).view(q.shape)


def round_activations(x: Tensor, group: int) -> Tensor:
    """x as the kernels see it: 8 bits per token and min(group, 32) channels; float32 arithmetic, float64 result."""
    groups = x.float().view(len(x), -1, min(group, 32))
    peak = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak > 0, 127.0 / peak, torch.zeros(()))
    return (torch.round(groups * inverse).double() * (peak / 127.0).double()).view(x.shape)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", ["minimum", "wide", "zeros", "constant"])
@pytest.mark.parametrize(
    ("n", "k", "bits", "group"), [(50, 96, 4, 32), (16, 64, 8, 16), (33, 256, 4, 128), (7, 128, 8, 64)]
)
def test_packing_loses_nothing(native: None, kind: str, n: int, k: int, bits: int, group: int) -> None:
    q, scales, mins = affine(n, k, bits, group, kind)
    unpacked = cpu.unpack(cpu.pack(q, scales, mins, bits))
    assert [torch.equal(a, b) for a, b in zip(unpacked, (q, scales, mins), strict=True)] == [True] * 3


def test_offsets_take_no_more_room_than_they_need(native: None) -> None:
    sizes = {
        kind: cpu.pack(*affine(64, 128, 4, 32, kind), 4).meta.numel()
        for kind in ("minimum", "wide", "zeros", "constant")
    }
    groups = 64 * 4
    assert sizes == {"constant": 2 * groups, "zeros": 3 * groups, "minimum": 4 * groups, "wide": 8 * groups}


def test_weights_that_no_kernel_takes_are_refused(native: None) -> None:
    q, scales, mins = affine(16, 96, 4, 32)
    with pytest.raises(ValueError, match="5 bits"):
        cpu.pack(q, scales, mins, 5)
    with pytest.raises(ValueError, match="16 x 96"):
        cpu.pack(q, scales[:, :2], mins[:, :2], 4)
    with pytest.raises(ValueError, match="uint8"):
        cpu.pack(q.int(), scales, mins, 4)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("n", "k", "bits", "group", "kind"),
    [
        (96, 576, 4, 32, "minimum"),
        (50, 576, 8, 32, "constant"),
        (33, 896, 4, 128, "zeros"),
        (48, 176, 8, 16, "minimum"),
        (17, 192, 4, 64, "wide"),
        (16, 32, 4, 16, "constant"),
    ],
)
def test_linear_is_exact_but_for_rounded_activations(
    target: str, tokens: int, n: int, k: int, bits: int, group: int, kind: str
) -> None:
    weight = affine(n, k, bits, group, kind)
    x = torch.randn(tokens, k)
    expected = round_activations(x, group) @ dequantize(*weight).T
    assert relative_error(cpu.linear(x, cpu.pack(*weight, bits)), expected) < 3e-6
    assert relative_error(round_activations(x, group), x.double()) < 0.01


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_linear_of_representable_activations_is_exact(target: str, bits: int, tokens: int) -> None:
    q = torch.randint(0, 2**bits, (40, 128), dtype=torch.uint8)
    scales, mins = torch.full((40, 4), 0.5), torch.full((40, 4), -2.0)
    x = torch.randint(-127, 128, (tokens, 128)).float()
    x[:, ::32] = 127.0
    expected = x.double() @ dequantize(q, scales, mins).T
    assert torch.equal(cpu.linear(x, cpu.pack(q, scales, mins, bits)).double(), expected)


def test_extreme_integers_do_not_overflow(target: str) -> None:
    for bits in (4, 8):
        q = torch.full((16, 128), 2**bits - 1, dtype=torch.uint8)
        scales, mins = torch.ones(16, 4), torch.zeros(16, 4)
        x = torch.cat((torch.full((1, 128), 127.0), torch.full((1, 128), -127.0)))
        assert torch.equal(cpu.linear(x, cpu.pack(q, scales, mins, bits)), x @ q.float().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_linear_fuses_norm_bias_and_residual(target: str, dtype: torch.dtype, tokens: int) -> None:
    weight = affine(50, 192, 4, 32)
    x, residual = torch.randn(tokens, 400).to(dtype)[:, 100:292], torch.randn(tokens, 60).to(dtype)[:, :50]
    gain, bias = torch.rand(192).to(dtype), torch.randn(50).to(dtype)
    packed = cpu.pack(*weight, 4)
    actual = cpu.linear(x, packed, bias=bias, norm_weight=gain, norm_eps=1e-3, norm_offset=1.0, residual=residual)
    wide = x.double()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-3) * (gain.double() + 1)
    expected = round_activations(normed, 32) @ dequantize(*weight).T + bias.double() + residual.double()
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < (5e-4 if dtype == torch.float32 else 4e-3)


def test_linear_can_widen_its_result(native: None) -> None:
    packed, x = cpu.pack(*affine(40, 64, 8, 32), 8), torch.randn(3, 64).bfloat16()
    wide = cpu.linear(x, packed, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.bfloat16(), cpu.linear(x, packed))


def test_a_token_does_not_depend_on_its_batch(native: None) -> None:
    packed, gate_up, down = (cpu.pack(*affine(n, k, 4, 32), 4) for n, k in ((96, 128), (192, 128), (128, 96)))
    x = torch.randn(29, 128)
    alone = torch.cat([cpu.linear(row[None], packed) for row in x])
    assert torch.equal(cpu.linear(x, packed), alone)
    alone = torch.cat([cpu.gated_mlp(row[None], gate_up, down, "silu") for row in x])
    assert torch.equal(cpu.gated_mlp(x, gate_up, down, "silu"), alone)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_do_not_depend_on_the_number_of_threads(native: None, threads: int) -> None:
    packed, x = cpu.pack(*affine(200, 256, 4, 32), 4), torch.randn(30, 256)
    expected, before = cpu.linear(x, packed), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(cpu.linear(x, packed), expected) for _ in range(50))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("tokens", "group"), [(1, 32), (13, 16), (64, 64)])
def test_gated_mlp_is_the_composition(target: str, activation: str, tokens: int, group: int) -> None:
    up_weight, down_weight = affine(2 * 320, 192, 4, group), affine(192, 320, 4, group)
    gate_up, down = cpu.pack(*up_weight, 4), cpu.pack(*down_weight, 4)
    x, gain = torch.randn(tokens, 192), torch.rand(192)
    actual = cpu.gated_mlp(x, gate_up, down, activation, norm_weight=gain, norm_eps=1e-5, residual=x)
    normed = basic.rms_norm(x.double(), gain, 1e-5)
    hidden = basic.gated_activation(round_activations(normed, group) @ dequantize(*up_weight).T, activation)
    expected = round_activations(hidden, group) @ dequantize(*down_weight).T + x.double()
    assert relative_error(actual, expected) < 1e-3


def test_gated_mlp_refuses_weights_that_do_not_fit(native: None) -> None:
    gate_up, down = cpu.pack(*affine(64, 32, 4, 32), 4), cpu.pack(*affine(32, 64, 4, 32), 4)
    with pytest.raises(ValueError, match="64 rows"):
        cpu.gated_mlp(torch.randn(1, 32), gate_up, down, "silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "group", "kind"), [(8, 32, "constant"), (4, 32, "minimum"), (4, 64, "zeros"), (8, 16, "wide")]
)
def test_embed_gives_the_rows(target: str, dtype: torch.dtype, bits: int, group: int, kind: str) -> None:
    weight = affine(70, 192, bits, group, kind)
    ids = torch.tensor([0, 69, 33, 33, 16, -1, 70])
    expected = dequantize(*weight)[ids.clamp(0, 69)]
    expected[-2:] = 0
    actual = cpu.embed(ids, cpu.pack(*weight, bits), dtype)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6 if dtype == torch.float32 else 4e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(70, 576), (5, 48), (1, 16)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 16])
def test_dense_linear(target: str, dtype: torch.dtype, n: int, k: int, tokens: int) -> None:
    weight, x = torch.randn(n, k + 16).bfloat16()[:, :k], torch.randn(tokens, k).to(dtype)
    gain, bias, residual = torch.rand(k), torch.randn(n).to(dtype), torch.randn(tokens, n).to(dtype)
    actual = cpu.dense_linear(x, weight, bias=bias, norm_weight=gain, norm_eps=1e-5, residual=residual)
    normed = basic.rms_norm(x.double(), gain, 1e-5)
    expected = normed @ weight.double().T + bias.double() + residual.double()
    size = normed.abs() @ weight.double().abs().T + bias.double().abs() + residual.double().abs()
    assert actual.dtype == dtype
    assert ((actual.double() - expected).abs() / size).max() < 5e-3
    plain = cpu.dense_linear(x, weight, out_dtype=torch.float32).double()
    error = (plain - x.double() @ weight.double().T).abs() / (x.double().abs() @ weight.double().abs().T)
    assert error.max() < (1e-6 if dtype == torch.bfloat16 else 4e-3)


def test_dense_linear_takes_only_what_it_is_fast_at(native: None) -> None:
    weight = torch.zeros(8, 32, dtype=torch.bfloat16)
    assert cpu.can_multiply_dense(weight, 16)
    assert not cpu.can_multiply_dense(weight, 17)
    assert not cpu.can_multiply_dense(weight.float(), 1)
    assert not cpu.can_multiply_dense(weight[:, :20], 1)
    with pytest.raises(ValueError, match="17 tokens"):
        cpu.dense_linear(torch.zeros(17, 32), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 576), (5, 3, 64), (7, 37)])
def test_rms_norm(target: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1])
    expected = basic.rms_norm(x.double(), weight.double(), 1e-6, 1.0)
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(cpu.rms_norm(x, weight, 1e-6, 1.0).double(), expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_activation(target: str, dtype: torch.dtype, activation: str) -> None:
    x = torch.cat((torch.linspace(-90, 90, 3 * 50).view(3, 50), torch.randn(3, 50)), dim=1).to(dtype)
    expected = basic.gated_activation(x.double(), activation)
    actual = cpu.gated_activation(x, activation).double()
    torch.testing.assert_close(actual, expected, rtol=1e-5 if dtype == torch.float32 else 4e-3, atol=2e-6)


def test_arguments_of_the_wrong_shape_are_refused(native: None) -> None:
    packed, x = cpu.pack(*affine(32, 64, 4, 32), 4), torch.randn(2, 64)
    with pytest.raises(ValueError, match="expected"):
        cpu.linear(x[:, :32], packed)
    with pytest.raises(ValueError, match="residual"):
        cpu.linear(x, packed, residual=torch.randn(2, 31))
    with pytest.raises(ValueError, match="vector"):
        cpu.linear(x, packed, bias=torch.randn(31))
    transposed = torch.randn(64, 2).T
    assert torch.equal(cpu.linear(transposed, packed), cpu.linear(transposed.contiguous(), packed))
    assert cpu.linear(x[:0], packed).shape == (0, 32)
