"""4-bit products whose rows do not depend on how many there are: variants compile, the rule's tilings fit, bits are equal."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lmdeploy.kernels import invariant
from lmdeploy.kernels.cuda import affine, byte_gemm, layer_tail, nvrtc, wide_gemm
from lmdeploy.kernels.cuda.byte_gemm import Digits
from lmdeploy.kernels.cuda.epilogue import GATED, Epilogue
from lmdeploy.kernels.cuda.layer_tail import Behind
from lmdeploy.kernels.cuda.skinny_gemm import Weight
from tests.kernels.cuda.outcomes import Outcomes, error_of, run_checks

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="there is no Hopper GPU")
NUM_CHECKS = 24


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
@pytest.mark.parametrize(
    ("n", "is_half", "has_zeros", "group"), [(28672, False, True, 128), (4096, True, False, 32), (272, False, True, 64)]
)
def test_variants_compile(
    tokens: int, n: int, is_half: bool, has_zeros: bool, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_gemm, "num_sms", lambda: 132)
    kind = GATED if n == 28672 else n % 32 // 16
    variant = byte_gemm.choose_variant(
        Weight(torch.empty(0), n, 256, 4, group, has_zeros),
        tokens,
        Epilogue(is_half, kind == 1, kind, 1, kind != GATED),
    )
    assert nvrtc.cubin("byte_gemm.cu", variant.macros(), "sm_90a")
    made = Digits(1152, group, tokens, is_half, 1.0 if kind else None)
    assert nvrtc.cubin("digits.cu", made.macros(), "sm_90a")


def test_the_rules_tilings_fit() -> None:
    """Every tile of rows has its place and each warpgroup a stage that is not another's, whatever the number of tokens."""
    rows = (16, 64, 272, 2048, 4096, 6144, 8448, 17920, 28672, 106496, 128256)
    weights = [(n, is_gated) for n in rows for is_gated in {False, n % 32 == 0}]
    for (n, is_gated), group, num_sms, tokens in product(weights, (128, 32), (132, 114, 78), (8, 16, 32, 64)):
        t = byte_gemm.choose_tiling(n, tokens, group, is_gated, num_sms)
        held = wide_gemm.tiles_per_block(n, t, is_gated)
        assert held <= t.capacity
        assert t.row_tiles <= 2
        assert held * t.row_blocks >= -(-n // 16)
        assert t.row_blocks <= -(-n // 16) // (2 if is_gated else 1)
        assert t.groups_k * t.cluster == byte_gemm.slices(n, num_sms)
        assert t.stages % t.groups_k == 0
        assert t.stages >= 2 * t.groups_k
        assert byte_gemm.shared_bytes(tokens, t, held, group) <= 226 << 10


def test_slices_are_as_many_as_give_each_multiprocessor_work() -> None:
    assert [byte_gemm.slices(n, 132) for n in (0, 16, 1536, 2048, 4096, 6144, 8448, 28672)] == [8, 8, 8, 8, 4, 2, 1, 1]


def test_layers_use_it_where_it_is_fastest_or_bits_must_not_depend_on_other_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = affine.PackedAffine(Weight(torch.zeros(1), 64, 256))
    x, asked = torch.zeros(40, 256, dtype=torch.bfloat16), []
    monkeypatch.setattr(wide_gemm, "supports", lambda x, w: True)
    monkeypatch.setattr(wide_gemm, "wide_gemm", lambda x, w, **named: x[:, : w.n])
    monkeypatch.setattr(byte_gemm, "byte_gemm", lambda x, w, **named: asked.append(len(x)) or x[:, : w.n])
    affine.linear(x, weight)
    assert not asked
    affine.linear(x[:32], weight)  # where it is the fastest
    assert asked.pop() == 32
    monkeypatch.setattr(invariant, "_is_on", True)
    affine.linear(x.repeat(3, 1), weight)
    affine.linear(x[:1], weight)
    assert asked == [64, 56, 1]


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    from benchmarks.byte_gemm import check

    return run_checks(check, NUM_CHECKS)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("number", range(NUM_CHECKS))
def test_against_float64_and_rows_alone(number: int, outcomes: Outcomes) -> None:
    assert error_of(outcomes[number]) < 2e-2


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("group", "has_zeros"), [(128, True), (128, False), (32, True), (64, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("activation", "heads", "hidden", "inner", "qkv"),
    # Slices of o, gates and ups, down, and qkv: 8 2 8 8; 4 1 4 8, several sets of units a warp; 2 1 2 2, uneven ones.
    [("silu", 1024, 1152, 2304, 1040), ("gelu", 4224, 4096, 9216, 1536), ("gelu_tanh", 2048, 4224, 4608, 6160)],
)
def test_a_token_has_the_bits_of_the_launch_behind_attention(
    group: int, has_zeros: bool, dtype: torch.dtype, activation: str, heads: int, hidden: int, inner: int, qkv: int
) -> None:
    from benchmarks.skinny_gemm import make_weight

    torch.manual_seed(0)
    o, gate_up, down, last = (
        make_weight(n, k, group, has_zeros)[0]
        for n, k in ((hidden, heads), (2 * inner, hidden), (hidden, inner), (qkv, hidden))
    )
    gammas = [(torch.rand(hidden, device="cuda") + 0.5).to(dtype) for _ in range(2)]
    bias = torch.randn(qkv, device="cuda").to(dtype)
    x, residual = (torch.randn(60, n, device="cuda").to(dtype) for n in (heads, hidden))
    x[:, 7] *= 100
    norms = [{"norm_weight": gamma, "norm_eps": 1e-5, "norm_offset": 0.5} for gamma in gammas]
    h = byte_gemm.byte_gemm(x, o, residual=residual)
    inside = byte_gemm.byte_gemm(h, gate_up, activation=activation, **norms[0])
    y = byte_gemm.byte_gemm(inside, down, residual=h)
    wide = byte_gemm.byte_gemm(y, last, bias=bias, **norms[1])
    behind = Behind(gammas[1], last, bias)
    for row in (0, 5, 59):
        rows = x[row : row + 1], residual[row : row + 1]
        found = layer_tail.layer_tail(*rows, o, gate_up, down, activation, behind=behind, **norms[0])
        assert torch.equal(found[0], y[row : row + 1])
        assert found[1] is not None
        assert torch.equal(found[1], wide[row : row + 1])
    layer_tail.give_up(torch.cuda.current_stream())
