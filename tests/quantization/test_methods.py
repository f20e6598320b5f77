"""The LinearMethods: what is stored, that every path through a linear computes the same, and which method is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmdeploy.kernels import aten_affine, cpu
from lmdeploy.kernels.reference import affine as reference
from lmdeploy.kernels.reference.basic import gated_activation, rms_norm
from lmdeploy.layers.layer_norm import LayerNorm
from lmdeploy.layers.linear import Linear
from lmdeploy.layers.norm import RMSNorm
from lmdeploy.quantization import QUANTIZATION, choose_method
from lmdeploy.quantization.affine import AffineMethod
from lmdeploy.quantization.method import LinearMethod
from lmdeploy.quantization.packing import AffineTensor
from lmdeploy.quantization.unquantized import UnquantizedMethod
from tests.quantization.affine_data import random_affine

CPU = torch.device("cpu")
BACKENDS = (
    "reference",
    "aten",
    pytest.param("cpu", marks=pytest.mark.skipif(not cpu.is_available(), reason="no compiler")),
)


def filled(linear: Linear, parts: list[Tensor | AffineTensor], method: LinearMethod, dtype: torch.dtype) -> Linear:
    """The linear under the method, its parts loaded in reverse order."""
    linear.method = method
    for part in reversed(range(len(parts))):
        method.load(linear, part, parts[part], CPU, dtype)
    method.finish(linear)
    return linear


def ones_norm(size: int) -> RMSNorm:
    norm = RMSNorm(size, 1e-5, offset=1.0)
    norm.weight = nn.Parameter(torch.linspace(-0.5, 0.5, size).bfloat16(), requires_grad=False)
    return norm


def close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((actual.double() - expected.double()).norm() <= tolerance * expected.double().norm())


@pytest.fixture(params=BACKENDS)
def affine_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    """Each module that can run affine weights, chosen as it would be on a machine that has no better one."""
    if request.param == "cpu":
        return cpu
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    if request.param == "reference":
        monkeypatch.setattr(aten_affine, "supports", lambda *args: False)
        return reference
    return aten_affine


def test_unquantized_copies_each_part_into_its_rows() -> None:
    parts: list[Tensor | AffineTensor] = [torch.randn(3, 32), torch.randn(2, 32).half(), random_affine(4, 32, 16, 4)]
    linear = filled(Linear(32, (3, 2, 4)), parts, UnquantizedMethod(), torch.float32)
    expected = torch.cat([p.dequantize(torch.float32) if isinstance(p, AffineTensor) else p.float() for p in parts])
    assert torch.equal(linear.method.dense_weight(linear), expected)
    assert linear.method.num_bytes(linear) == 9 * 32 * 4
    assert [name for name, _ in linear.named_parameters()] == ["weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40])
def test_unquantized_applies_norm_bias_and_residual(dtype: torch.dtype, tokens: int) -> None:
    weight, x, residual = torch.randn(48, 64) / 8, torch.randn(tokens, 64).to(dtype), torch.randn(tokens, 48).to(dtype)
    linear = filled(Linear(64, 48, bias=True), [weight], UnquantizedMethod(), dtype)
    linear.bias = nn.Parameter(torch.randn(48).to(dtype), requires_grad=False)
    before = residual.clone()
    norm = ones_norm(64)
    normed = rms_norm(x.float(), norm.weight, 1e-5, 1.0)
    expected = F.linear(normed, weight, linear.bias.float()) + residual.float()
    actual = linear.method.apply(linear, x, norm=norm, residual=residual)
    assert actual.dtype == dtype
    assert close(actual, expected, 1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(residual, before)
    ids = torch.tensor([3, 0, 47])
    assert torch.equal(linear.method.embed(linear, ids), weight.to(dtype)[ids])


def test_layer_norm_in_front_is_computed_outside_the_kernel() -> None:
    norm = LayerNorm(64, 1e-5)
    norm.weight = nn.Parameter(torch.rand(64).bfloat16() + 0.5, requires_grad=False)
    norm.bias = nn.Parameter(torch.rand(64).bfloat16(), requires_grad=False)
    weight, x = random_affine(32, 64, 32, 4), torch.randn(3, 64).bfloat16()
    linear = filled(Linear(64, 32), [weight], AffineMethod(), torch.bfloat16)
    expected = F.linear(norm(x).float(), weight.dequantize(torch.float32))
    assert close(linear.method.apply(linear, x, norm=norm), expected, 3e-2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 128])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_affine_linear(affine_kernels: object, bits: int, group_size: int, tokens: int) -> None:
    weight, norm = random_affine(48, 256, group_size, bits), ones_norm(256)
    linear = filled(Linear(256, 48, bias=True), [weight], AffineMethod(), torch.bfloat16)
    linear.bias = nn.Parameter(torch.randn(48).bfloat16(), requires_grad=False)
    assert isinstance(linear.method, AffineMethod)
    is_supported = affine_kernels is not aten_affine or (bits == 4 and group_size > 16)
    assert linear.method.kernels is (affine_kernels if is_supported else reference)
    x, residual = torch.randn(tokens, 256).bfloat16(), torch.randn(tokens, 48).bfloat16()
    normed = rms_norm(x.float(), norm.weight, 1e-5, 1.0)
    expected = F.linear(normed, weight.dequantize(torch.float32), linear.bias.float()) + residual.float()
    actual = linear.method.apply(linear, x, norm=norm, residual=residual)
    assert actual.dtype == torch.bfloat16
    assert close(actual, expected, 2e-2)


def test_affine_parts_that_differ_lose_nothing(affine_kernels: object) -> None:
    parts = [random_affine(16, 128, 32, 4, 0), random_affine(16, 128, 16, 8, 1), random_affine(32, 128, 64, 4, 2)]
    linear = filled(Linear(128, (16, 16, 32)), list(parts), AffineMethod(), torch.bfloat16)
    expected = torch.cat([part.dequantize(torch.bfloat16) for part in parts])
    assert torch.equal(linear.method.dense_weight(linear), expected)
    ids = torch.tensor([0, 17, 63, 17])
    assert torch.equal(linear.method.embed(linear, ids), expected[ids])


def test_affine_weights_stay_small(affine_kernels: object) -> None:
    linear = filled(Linear(256, 64), [random_affine(64, 256, 128, 4)], AffineMethod(), torch.bfloat16)
    limit = 1.3 if affine_kernels is aten_affine else 0.7  # that one keeps two forms
    assert 0.5 * 64 * 256 < linear.method.num_bytes(linear) < limit * 64 * 256
    assert list(linear.parameters()) == []


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 33])
def test_gated_mlp(affine_kernels: object, activation: str, has_bias: bool, tokens: int) -> None:
    norm, halves = ones_norm(64), [random_affine(96, 64, 32, 4, 1), random_affine(96, 64, 32, 4, 2)]
    gate_up = filled(Linear(64, (96, 96), bias=has_bias), list(halves), AffineMethod(), torch.bfloat16)
    down = filled(Linear(96, 64), [random_affine(64, 96, 32, 4, 3)], AffineMethod(), torch.bfloat16)
    if has_bias:
        gate_up.bias = nn.Parameter(torch.randn(192).bfloat16(), requires_grad=False)
    x, residual = torch.randn(tokens, 64).bfloat16(), torch.randn(tokens, 64).bfloat16()
    bias = gate_up.bias.float() if gate_up.bias is not None else None
    normed = rms_norm(x.float(), norm.weight, 1e-5, 1.0)
    both = F.linear(normed, gate_up.method.dense_weight(gate_up).float(), bias)
    hidden = gated_activation(both, activation)
    expected = F.linear(hidden, down.method.dense_weight(down).float()) + residual.float()
    actual = gate_up.method.gated_mlp(x, norm, gate_up, down, activation, residual)
    assert close(actual, expected, 3e-2)


def test_gated_mlp_of_two_storages() -> None:
    gate_up = filled(
        Linear(64, (32, 32)), [random_affine(32, 64, 32, 4, i) for i in (0, 1)], AffineMethod(), torch.bfloat16
    )
    down = filled(Linear(32, 64), [torch.randn(64, 32) / 6], UnquantizedMethod(), torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    hidden = gated_activation(F.linear(x.float(), gate_up.method.dense_weight(gate_up).float()), "silu")
    expected = F.linear(hidden, down.method.dense_weight(down).float())
    assert close(gate_up.method.gated_mlp(x, None, gate_up, down, "silu", None), expected, 3e-2)


def test_affine_method_takes_no_dense_part() -> None:
    with pytest.raises(TypeError, match="dense"):
        filled(Linear(32, 4), [torch.zeros(4, 32)], AffineMethod(), torch.bfloat16)


@pytest.mark.parametrize(
    ("kinds", "dtype", "expected"),
    [
        ({"dense"}, torch.bfloat16, UnquantizedMethod),
        ({"affine4"}, torch.bfloat16, AffineMethod),
        ({"affine4", "affine8"}, torch.bfloat16, AffineMethod),
        ({"affine4", "dense"}, torch.bfloat16, UnquantizedMethod),
        ({"affine4"}, torch.float32, UnquantizedMethod),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, kinds: set[str], dtype: torch.dtype, expected: type[LinearMethod]
) -> None:
    monkeypatch.setattr(cpu, "is_available", lambda: True)
    assert type(choose_method(kinds, CPU, dtype)) is expected


def test_choice_without_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    assert type(choose_method({"affine8"}, CPU, torch.bfloat16)) is UnquantizedMethod
    assert type(choose_method({"affine4"}, CPU, torch.bfloat16)) is AffineMethod
    assert type(choose_method({"affine8"}, torch.device("cuda"), torch.float16)) is AffineMethod


def test_every_entry_of_the_table_exists() -> None:
    import importlib

    for entry in QUANTIZATION.values():
        module, name = entry.split(":")
        assert issubclass(getattr(importlib.import_module(f"lmdeploy.quantization.{module}"), name), LinearMethod)
