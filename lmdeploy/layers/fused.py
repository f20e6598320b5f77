"""The seams that model files compose. A kernel replaces a seam, never a model file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lmdeploy.layers.linear import Linear
from lmdeploy.layers.norm import Norm

if TYPE_CHECKING:
    from lmdeploy.layers.mlp import GatedMLP
    from lmdeploy.quantization.method import Behind, Tail


def norm_linear(x: Tensor, norm: Norm | None, linear: Linear) -> Tensor:
    """linear(norm(x)): [T, K] -> [T, N]."""
    return linear.method.apply(linear, x, norm=norm)


def gated_mlp(
    x: Tensor, norm: Norm | None, gate_up: Linear, down: Linear, activation: str, residual: Tensor | None = None
) -> Tensor:
    """down(activation(gate) * up) + residual with gate | up = gate_up(norm(x)): [T, C] -> [T, C]."""
    return gate_up.method.gated_mlp(x, norm, gate_up, down, activation, residual)


def layer_tail(x: Tensor, residual: Tensor, o: Linear, norm: Norm, mlp: GatedMLP, behind: Behind | None) -> Tail:
    """h + mlp(norm(h)) with h = o(x) + residual, [T, C]; and behind's linear of its norm, where one kernel makes it, too."""
    return o.method.layer_tail(x, residual, o, norm, mlp, behind)
