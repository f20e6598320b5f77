"""The feed-forward block of a decoder layer."""

from __future__ import annotations

from torch import Tensor, nn

from lmdeploy.layers.fused import gated_mlp
from lmdeploy.layers.linear import Linear
from lmdeploy.layers.norm import Norm


class GatedMLP(nn.Module):
    """down(activation(gate x) * up x). https://arxiv.org/abs/2002.05202"""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, (intermediate_size, intermediate_size), bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor, norm: Norm | None, residual: Tensor | None) -> Tensor:
        return gated_mlp(x, norm, self.gate_up_proj, self.down_proj, self.activation, residual)
