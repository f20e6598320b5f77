"""The usual normalization layer. `kind` tells a LinearMethod whether it can fuse the layer in front of its own product."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from lmdeploy import kernels

if TYPE_CHECKING:
    from lmdeploy.layers.layer_norm import LayerNorm


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), statistics in float32. https://arxiv.org/abs/1910.07467"""

    kind = "rms"

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps, self.offset)


Norm: TypeAlias = "RMSNorm | LayerNorm"
