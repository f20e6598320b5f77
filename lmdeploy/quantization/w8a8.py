"""Weights kept as int8 with a scale per output channel, activations quantized per token. It knows no checkpoint format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmdeploy.kernels.reference import w8a8
from lmdeploy.quantization.fp8 import ScaledMethod

if TYPE_CHECKING:
    from lmdeploy.layers.linear import Linear
    from lmdeploy.layers.norm import Norm


class Int8Method(ScaledMethod):
    """SmoothQuant's product. https://arxiv.org/abs/2211.10438"""

    name = "w8a8"

    def apply(self, linear: Linear, x: Tensor, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        return w8a8.linear(x, self.weight.q, self.weight.scales, bias=linear.bias, residual=residual)

    def logits(self, linear: Linear, x: Tensor) -> Tensor:
        return w8a8.linear(x, self.weight.q, self.weight.scales, bias=linear.bias, out_dtype=torch.float32)
