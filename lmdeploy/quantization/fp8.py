"""Weights kept as 8-bit floats with scales; activations stay as they are. It knows no checkpoint format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmdeploy.kernels.reference import fp8
from lmdeploy.quantization.method import LinearMethod
from lmdeploy.quantization.scaled import ScaledTensor

if TYPE_CHECKING:
    from lmdeploy.layers.linear import Linear
    from lmdeploy.layers.norm import Norm
    from lmdeploy.quantization.method import Part


class ScaledMethod(LinearMethod):
    """What the methods of 8-bit weights share: how parts are gathered and what the weight's values are."""

    weight: ScaledTensor

    def __init__(self) -> None:
        self.dtype = torch.bfloat16
        self._parts: dict[int, ScaledTensor] = {}

    def load(self, linear: Linear, part: int, value: Part, device: torch.device, dtype: torch.dtype) -> None:
        """Keep the part's bytes until the others are there."""
        if not isinstance(value, ScaledTensor):
            raise TypeError(f"a part of {linear} is no scaled tensor; UnquantizedMethod takes such linears")
        self._parts[part] = value.to(device)
        self.dtype = dtype

    def finish(self, linear: Linear) -> None:
        self.weight = ScaledTensor.stack([self._parts[part] for part in range(len(linear.parts))])
        self._parts = {}

    def embed(self, linear: Linear, ids: Tensor) -> Tensor:
        return fp8.embed(ids, self.weight.q, self.weight.scales, self.weight.group_size, self.dtype)

    def dense_weight(self, linear: Linear) -> Tensor:
        return self.weight.dequantize(self.dtype)

    def num_bytes(self, linear: Linear) -> int:
        return super().num_bytes(linear) + sum(
            t.numel() * t.element_size() for t in (self.weight.q, self.weight.scales)
        )


class Float8Method(ScaledMethod):
    """float8 weights, dequantized for each product."""

    name = "fp8"

    def apply(self, linear: Linear, x: Tensor, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        x = x if norm is None else norm(x)
        w = self.weight
        return fp8.linear(x, w.q, w.scales, w.group_size, bias=linear.bias, residual=residual)
