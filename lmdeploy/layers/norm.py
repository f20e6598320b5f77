"""Normalization layers. `kind` tells a LinearMethod whether it can fuse the layer in front of its own product."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmdeploy import kernels


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


class LayerNorm(nn.Module):
    """(x - mean) / std * weight (+ bias), statistics in float32."""

    kind = "layer"

    def __init__(self, size: int, eps: float, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


Norm = RMSNorm | LayerNorm
