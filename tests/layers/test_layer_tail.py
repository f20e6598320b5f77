"""What lies behind attention at once: one token's steps, q, k and v handed to the next layer, and when a method may do it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmdeploy.layers.layer_norm import LayerNorm
from lmdeploy.layers.linear import Linear
from lmdeploy.layers.mlp import GatedMLP
from lmdeploy.layers.norm import RMSNorm
from lmdeploy.models.loader import load_model
from lmdeploy.quantization.affine import AffineMethod
from lmdeploy.quantization.method import LinearMethod
from lmdeploy.quantization.unquantized import UnquantizedMethod
from tests.models.driver import Driver
from tests.tiny_model import make_tiny_llama


def test_the_next_layer_takes_q_k_and_v_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(make_tiny_llama(tmp_path, num_hidden_layers=3), dtype="float32")
    driver = Driver(model)
    sequences = [driver.add([5, 7, 11, 13, 17]) for _ in range(2)]
    driver.step(sequences[:1], [3])
    driver.step(sequences[1:], [3])
    expected = driver.step(sequences[:1], [1])
    handed: list[bool] = []
    made: list[Linear] = []
    plain, apply = LinearMethod.layer_tail, UnquantizedMethod.apply

    def at_once(self: LinearMethod, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        y, _ = plain(self, *arguments)
        behind = arguments[-1]
        handed.append(behind is not None)
        return y, None if behind is None else behind[1](behind[0](y))

    def counted(self: UnquantizedMethod, linear: Linear, x: Tensor, **named: Any) -> Tensor:
        made.append(linear)
        return apply(self, linear, x, **named)

    monkeypatch.setattr(LinearMethod, "layer_tail", at_once)
    monkeypatch.setattr(UnquantizedMethod, "apply", counted)
    found = driver.step(sequences[1:], [1])
    assert handed == [True, True, False]
    projections = [layer.self_attn.qkv_proj for layer in model.layers]  # type: ignore[union-attr]
    assert [made.count(each) for each in projections] == [1, 1, 1]
    torch.testing.assert_close(found, expected)
    handed.clear()
    driver.step(sequences, [1, 1])
    assert not handed  # two tokens


class Kernels(SimpleNamespace):
    """Stands for a module of kernels; remembers what it was asked for."""

    def layer_tail(self, *arguments: Any) -> Any:
        self.asked = arguments
        return self.answer


@pytest.fixture
def parts() -> tuple[Kernels, Linear, RMSNorm, GatedMLP, tuple[RMSNorm, Linear]]:
    kernels = Kernels(answer=(torch.zeros(1, 8), None), asked=None)
    o, qkv, mlp = Linear(8, 8), Linear(8, (8, 4, 4), bias=True), GatedMLP(8, 16, "silu")
    for index, linear in enumerate((o, mlp.gate_up_proj, mlp.down_proj, qkv)):
        method = AffineMethod()
        method.kernels, method.packed = kernels, index  # type: ignore[assignment]
        linear.method = method
    return kernels, o, RMSNorm(8, 1e-5), mlp, (RMSNorm(8, 1e-5), qkv)


def ask(o: Linear, norm: Any, mlp: GatedMLP, behind: Any) -> Any:
    return o.method._tail_at_once(torch.ones(1, 8), torch.zeros(1, 8), o, norm, mlp, behind)  # type: ignore[attr-defined]


def test_weights_of_four_linears_go_to_one_kernel(parts: Any) -> None:
    kernels, o, norm, mlp, behind = parts
    assert ask(o, norm, mlp, behind) is kernels.answer
    assert kernels.asked[2:4] == ([0, 1, 2, 3], "silu")
    assert kernels.asked[4]["norm_weight"] is norm.weight
    assert kernels.asked[5] is behind[0].weight
    assert kernels.asked[6] is behind[1].bias
    assert ask(o, norm, mlp, None) is kernels.answer
    assert kernels.asked[2] == [0, 1, 2]
    assert kernels.asked[5:] == (None, None)


def test_what_the_kernel_does_not_know_is_made_one_by_one(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, o, norm, mlp, behind = parts
    assert ask(o, LayerNorm(8, 1e-5), mlp, None) is None
    assert ask(o, norm, mlp, (RMSNorm(8, 1e-6), behind[1])) is None
    assert ask(o, norm, mlp, (RMSNorm(8, 1e-5, offset=1.0), behind[1])) is None
    with monkeypatch.context() as patched:
        patched.setattr(o, "bias", nn.Parameter(torch.zeros(8)))
        assert ask(o, norm, mlp, behind) is None
    for linear in (mlp.gate_up_proj, mlp.down_proj, behind[1]):
        with monkeypatch.context() as patched:
            patched.setattr(linear.method, "columns", torch.arange(8))
            assert ask(o, norm, mlp, behind) is None
        with monkeypatch.context() as patched:
            patched.setattr(linear.method, "kernels", Kernels())
            assert ask(o, norm, mlp, behind) is None
        with monkeypatch.context() as patched:
            patched.setattr(linear, "method", UnquantizedMethod())
            assert ask(o, norm, mlp, behind) is None
    assert kernels.asked is None


def test_a_kernel_that_declines_leaves_it_to_the_products(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, o, norm, mlp, behind = parts
    kernels.answer = None
    x, residual, h = torch.ones(1, 8), torch.zeros(1, 8), torch.full((1, 8), 2.0)
    monkeypatch.setattr(Linear, "forward", lambda self, x, residual=None: h)
    monkeypatch.setattr(GatedMLP, "forward", lambda self, x, norm, residual: (x, norm, residual))
    (made, used, added), qkv = o.method.layer_tail(x, residual, o, norm, mlp, behind)
    assert made is h
    assert added is h
    assert used is norm
    assert qkv is None
