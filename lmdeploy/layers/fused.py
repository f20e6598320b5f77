"""The seams that model files compose. A kernel replaces a seam, never a model file."""

from __future__ import annotations

from torch import Tensor

from lmdeploy.layers.linear import Linear
from lmdeploy.layers.norm import Norm


def norm_linear(x: Tensor, norm: Norm | None, linear: Linear) -> Tensor:
    """linear(norm(x)): [T, K] -> [T, N]."""
    return linear.method.apply(linear, x, norm=norm)


def gated_mlp(
    x: Tensor, norm: Norm | None, gate_up: Linear, down: Linear, activation: str, residual: Tensor | None = None
) -> Tensor:
    """down(activation(gate) * up) + residual with gate | up = gate_up(norm(x)): [T, C] -> [T, C]."""
    return gate_up.method.gated_mlp(x, norm, gate_up, down, activation, residual)
