"""Tensors of 8-bit floats and integers with scales, the products over them, and affine weights with an order of columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmdeploy.errors import CheckpointError
from lmdeploy.kernels import cpu
from lmdeploy.kernels.reference import fp8, w8a8
from lmdeploy.layers.linear import Linear
from lmdeploy.layers.norm import RMSNorm
from lmdeploy.quantization import QUANTIZATION, choose_method
from lmdeploy.quantization.affine import AffineMethod, kernel_groups
from lmdeploy.quantization.fp8 import Float8Method, ScaledMethod
from lmdeploy.quantization.method import LinearMethod
from lmdeploy.quantization.packing import AffineTensor
from lmdeploy.quantization.scaled import ScaledTensor, read_scaled
from lmdeploy.quantization.unquantized import UnquantizedMethod
from lmdeploy.quantization.w8a8 import Int8Method
from tests.quantization.affine_data import random_affine

CPU = torch.device("cpu")
TYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


def random_scaled(rows: int, columns: int, group_size: int, dtype: torch.dtype, seed: int = 0) -> ScaledTensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * (40 if dtype == torch.int8 else 10)
    scales = (torch.rand(rows, -(-columns // group_size), generator=generator) + 0.5) / 40 * columns**-0.5
    return ScaledTensor(values.clamp(-127, 127).to(dtype), scales, group_size)


def values_of(weight: ScaledTensor) -> Tensor:
    """Entry by entry."""
    group = torch.arange(weight.q.shape[1]) // weight.group_size
    return weight.q.float() * weight.scales[:, group]


def filled(linear: Linear, parts: list[ScaledTensor | AffineTensor], method: LinearMethod) -> Linear:
    linear.method = method
    for part in reversed(range(len(parts))):
        method.load(linear, part, parts[part], CPU, torch.bfloat16)
    method.finish(linear)
    return linear


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group_size", [200, 100, 64])
def test_values_rows_and_stacks(dtype: torch.dtype, group_size: int) -> None:
    weight = random_scaled(24, 200, group_size, dtype)
    expected = values_of(weight)
    assert torch.equal(weight.dequantize(torch.float32), expected)
    assert torch.equal(weight.dequantize(torch.bfloat16), expected.bfloat16())
    index = torch.tensor([3, 1, 23])
    assert torch.equal(weight.rows(index).dequantize(torch.float32), expected[index])
    assert torch.equal(weight.rows(slice(4, 9)).dequantize(torch.float32), expected[4:9])
    other = random_scaled(8, 200, 200, dtype, seed=1)
    stacked = ScaledTensor.stack([weight, other])
    assert torch.equal(stacked.dequantize(torch.float32), torch.cat((expected, values_of(other))))
    with pytest.raises(ValueError, match="cannot be cut"):
        weight.to_group(group_size - 1)


def test_scales_of_every_shape() -> None:
    q = torch.randn(200, 300).to(torch.float8_e4m3fn)
    tensor, rows = torch.tensor(0.5), torch.rand(200)
    blocks = torch.rand(2, 3)
    by_block = blocks[torch.arange(200)[:, None] // 128, torch.arange(300) // 128]
    for scale, expected in (
        (tensor, tensor),
        (rows, rows[:, None]),
        (rows[:, None], rows[:, None]),
        (blocks, by_block),
    ):
        assert torch.equal(read_scaled(q, scale).dequantize(torch.float32), q.float() * expected)
    with pytest.raises(CheckpointError, match=r"scales \[3, 3\] do not cover a weight 200 x 300"):
        read_scaled(q, torch.rand(3, 3))
    one_row = read_scaled(q[:1], torch.rand(1, 3))
    assert one_row.group_size == 128


@pytest.mark.parametrize("tokens", [1, 7])
def test_float8_linear(tokens: int) -> None:
    weight, x = random_scaled(48, 200, 64, torch.float8_e4m3fn), torch.randn(tokens, 200)
    bias, residual = torch.randn(48), torch.randn(tokens, 48)
    out = fp8.linear(x, weight.q, weight.scales, 64, bias=bias, residual=residual)
    assert relative(out, F.linear(x, values_of(weight), bias) + residual) < 1e-6
    assert fp8.linear(x.bfloat16(), weight.q, weight.scales, 64, out_dtype=torch.float32).dtype == torch.float32


def test_tokens_are_quantized_each_for_itself() -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [254.0, 1.0, -127.0]])
    integers, scales = w8a8.quantize_tokens(x)
    assert integers.tolist() == [[64, -127, 32], [0, 0, 0], [127, 0, -64]]
    assert torch.allclose(scales, torch.tensor([[2 / 127], [0.0], [2.0]]))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("shape", [(48, 64), (33, 50)])
def test_int8_linear_is_exact_in_integers(tokens: int, shape: tuple[int, int]) -> None:
    weight, x = random_scaled(*shape, shape[1], torch.int8), torch.randn(tokens, shape[1])
    integers, scales = w8a8.quantize_tokens(x)
    product = integers.double() @ weight.q.double().T
    bias, residual = torch.randn(shape[0]), torch.randn(tokens, shape[0])
    expected = product * scales * weight.scales.T + bias + residual
    assert torch.equal(w8a8.integer_product(integers, weight.q).double(), product)
    actual = w8a8.linear(x, weight.q, weight.scales, bias=bias, residual=residual)
    assert relative(actual, expected) < 1e-6
    assert relative(actual - bias - residual, x @ values_of(weight).T) < 0.02


@pytest.mark.parametrize(
    ("method", "dtype"), [(Float8Method, TYPES[0]), (Float8Method, TYPES[1]), (Int8Method, TYPES[2])]
)
def test_methods(method: type[ScaledMethod], dtype: torch.dtype) -> None:
    parts: list[ScaledTensor | AffineTensor] = [random_scaled(rows, 64, 64, dtype, rows) for rows in (16, 8)]
    linear = filled(Linear(64, (16, 8), bias=True), parts, method())
    linear.bias = nn.Parameter(torch.randn(24).bfloat16(), requires_grad=False)
    weight = torch.cat([part.dequantize(torch.bfloat16) for part in parts])
    assert torch.equal(linear.method.dense_weight(linear), weight)
    ids = torch.tensor([0, 23, 16])
    assert torch.equal(linear.method.embed(linear, ids), weight[ids])
    norm = RMSNorm(64, 1e-5)
    norm.weight = nn.Parameter(torch.rand(64).bfloat16() + 0.5, requires_grad=False)
    x, residual = torch.randn(5, 64).bfloat16(), torch.randn(5, 24).bfloat16()
    expected = F.linear(norm(x).float(), weight.float(), linear.bias.float())
    actual = linear.method.apply(linear, x, norm=norm, residual=residual)
    assert actual.dtype == torch.bfloat16
    assert relative(actual, expected + residual.float()) < 2e-2
    logits = linear.method.logits(linear, norm(x))
    assert logits.dtype == torch.float32
    assert relative(logits, expected) < 2e-2
    assert linear.method.num_bytes(linear) == 24 * 64 + 24 * 4 + 24 * 2
    with pytest.raises(TypeError, match="no scaled tensor"):
        method().load(linear, 0, torch.zeros(16, 64), CPU, torch.bfloat16)


@pytest.mark.parametrize(
    ("kinds", "device", "dtype", "expected"),
    [
        ({"int8"}, "cpu", torch.bfloat16, Int8Method),
        ({"int8"}, "cuda", torch.float16, Int8Method),
        ({"int8"}, "cpu", torch.float32, UnquantizedMethod),
        ({"int8", "dense"}, "cuda", torch.bfloat16, UnquantizedMethod),
        ({"int8", "affine8"}, "cuda", torch.bfloat16, UnquantizedMethod),
        ({"float8_e4m3fn"}, "cuda", torch.bfloat16, Float8Method),
        ({"float8_e5m2"}, "cuda", torch.bfloat16, Float8Method),
        ({"float8_e4m3fn", "float8_e5m2"}, "cuda", torch.bfloat16, UnquantizedMethod),
        ({"float8_e4m3fn"}, "cpu", torch.bfloat16, UnquantizedMethod),
        (set(), "cuda", torch.bfloat16, UnquantizedMethod),
    ],
)
def test_choice(kinds: set[str], device: str, dtype: torch.dtype, expected: type[LinearMethod]) -> None:
    assert type(choose_method(kinds, torch.device(device), dtype)) is expected


def test_the_table_names_what_is_read() -> None:
    assert {"awq", "gptq", "compressed-tensors", "fp8", "smooth_quant", "mxfp4", "gguf"} <= set(QUANTIZATION)


def with_order(weight: AffineTensor, seed: int) -> AffineTensor:
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed))
    return AffineTensor(weight.q, weight.scales, weight.mins, weight.bits, order)


@pytest.mark.parametrize("has_kernel", [True, False])
def test_affine_weight_with_an_order_of_columns(monkeypatch: pytest.MonkeyPatch, has_kernel: bool) -> None:
    if has_kernel and not cpu.is_available():
        pytest.skip("no compiler")
    if not has_kernel:
        monkeypatch.setattr(cpu, "is_available", lambda: False)
    parts: list[ScaledTensor | AffineTensor] = [with_order(random_affine(96, 64, 32, 4, seed), 5) for seed in (1, 2)]
    gate_up = filled(Linear(64, (96, 96)), parts, AffineMethod())
    down = filled(Linear(96, 64), [with_order(random_affine(64, 96, 32, 4, 3), 6)], AffineMethod())
    weight = torch.cat([part.dequantize(torch.bfloat16) for part in parts])
    assert torch.equal(gate_up.method.dense_weight(gate_up), weight)
    ids = torch.tensor([4, 190, 0])
    assert torch.equal(gate_up.method.embed(gate_up, ids), weight[ids])
    norm = RMSNorm(64, 1e-5)
    norm.weight = nn.Parameter(torch.rand(64).bfloat16() + 0.5, requires_grad=False)
    x, residual = torch.randn(3, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    both = F.linear(norm(x).float(), weight.float())
    assert relative(gate_up.method.apply(gate_up, x, norm=norm), both) < 2e-2
    assert relative(gate_up.method.logits(gate_up, norm(x)), both) < 2e-2
    hidden = F.silu(both[:, :96]) * both[:, 96:]
    expected = F.linear(hidden, down.method.dense_weight(down).float()) + residual.float()
    assert relative(gate_up.method.gated_mlp(x, norm, gate_up, down, "silu", residual), expected) < 3e-2


def test_orders_that_differ_make_the_linear_dense() -> None:
    parts: list[ScaledTensor | AffineTensor] = [with_order(random_affine(8, 64, 32, 4, seed), seed) for seed in (1, 2)]
    linear = filled(Linear(64, (8, 8)), parts, AffineMethod())
    assert type(linear.method) is UnquantizedMethod
    expected = torch.cat([part.dequantize(torch.bfloat16) for part in parts])
    assert torch.equal(linear.method.dense_weight(linear), expected)
    with pytest.raises(ValueError, match="different orders"):
        AffineTensor.stack([part for part in parts if isinstance(part, AffineTensor)])


@pytest.mark.parametrize(("group_size", "expected"), [(16, 16), (64, 64), (96, 32), (256, 128), (512, 128), (24, 24)])
def test_groups_as_kernels_take_them(group_size: int, expected: int) -> None:
    weight = random_affine(4, 4 * group_size, group_size, 4)
    fitted = kernel_groups(weight)
    assert fitted.group_size == expected
    assert torch.equal(fitted.dequantize(torch.float32), weight.dequantize(torch.float32))


def test_a_group_size_that_no_kernel_takes() -> None:
    weight = random_affine(8, 48, 24, 4)
    linear = filled(Linear(48, 8), [weight], AffineMethod())
    x = torch.randn(2, 48).bfloat16()
    assert relative(linear.method.apply(linear, x), F.linear(x.float(), weight.dequantize(torch.float32))) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", TYPES)
def test_on_a_gpu_as_on_the_cpu(dtype: torch.dtype, tokens: int) -> None:
    weight, x = random_scaled(48, 64, 64, dtype), torch.randn(tokens, 64)
    device = torch.device("cuda")
    method = choose_method({str(dtype).removeprefix("torch.")}, device, torch.bfloat16)
    linear = Linear(64, 48)
    method.load(linear, 0, weight, device, torch.bfloat16)
    method.finish(linear)
    actual = method.apply(linear, x.to(device).bfloat16())
    assert actual.device.type == "cuda"
    assert relative(actual.cpu(), x @ values_of(weight).T) < 3e-2


@pytest.mark.gpu
def test_an_order_of_columns_on_a_gpu() -> None:
    weight, device, x = with_order(random_affine(48, 64, 32, 4), 1), torch.device("cuda"), torch.randn(3, 64)
    method = choose_method({"affine4"}, device, torch.float16)
    linear = Linear(64, 48)
    method.load(linear, 0, weight, device, torch.float16)
    method.finish(linear)
    assert isinstance(method, AffineMethod)
    assert relative(method.apply(linear, x.to(device).half()).cpu(), x @ weight.dequantize(torch.float32).T) < 1e-2
    assert torch.equal(method.dense_weight(linear).cpu(), weight.dequantize(torch.float16))
