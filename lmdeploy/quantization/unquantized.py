"""Weights kept as plain matrices in the compute dtype. It knows no checkpoint format; it undoes affine and scaled parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmdeploy import kernels
from lmdeploy.quantization.method import LinearMethod

if TYPE_CHECKING:
    from lmdeploy.layers.linear import Linear
    from lmdeploy.layers.norm import Norm
    from lmdeploy.quantization.method import Part


class UnquantizedMethod(LinearMethod):
    """The weight is a parameter [N, K] of the linear; quantized parts of a checkpoint are dequantized on their way into it."""

    name = "unquantized"

    def load(self, linear: Linear, part: int, value: Part, device: torch.device, dtype: torch.dtype) -> None:
        """Write the part into its rows of the one tensor that there is."""
        if not hasattr(linear, "weight"):
            weight = torch.empty(linear.out_features, linear.in_features, dtype=dtype, device=device)
            linear.weight = nn.Parameter(weight, requires_grad=False)
        start = sum(linear.parts[:part])
        rows = _weight(linear).data[start : start + linear.parts[part]]
        if isinstance(value, Tensor):
            rows.copy_(value)
        else:
            value.to(device).dequantize_into(rows)

    def apply(self, linear: Linear, x: Tensor, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        x, fused = fused_norm(x, norm)
        return kernels.dense_linear(x, _weight(linear), bias=linear.bias, residual=residual, **fused)

    def logits(self, linear: Linear, x: Tensor) -> Tensor:
        return kernels.dense_linear(x, _weight(linear), bias=linear.bias, out_dtype=torch.float32)

    def gated_mlp(
        self, x: Tensor, norm: Norm | None, gate_up: Linear, down: Linear, activation: str, residual: Tensor | None
    ) -> Tensor:
        if not (kernels.runs_on_gpu(x) and isinstance(down.method, UnquantizedMethod)):
            return super().gated_mlp(x, norm, gate_up, down, activation, residual)
        from lmdeploy.kernels.cuda import dense

        x, fused = fused_norm(x, norm)
        fused.update(gate_up_bias=gate_up.bias, down_bias=down.bias)
        return dense.gated_mlp(x, _weight(gate_up), _weight(down), activation, residual=residual, **fused)

    def embed(self, linear: Linear, ids: Tensor) -> Tensor:
        return F.embedding(ids, _weight(linear))

    def dense_weight(self, linear: Linear) -> Tensor:
        """The weight itself, not a copy."""
        return _weight(linear)


def fused_norm(x: Tensor, norm: Norm | None) -> tuple[Tensor, dict[str, Any]]:
    """x and the arguments of a kernel that runs an RMS norm itself; any other norm is computed here."""
    if norm is None:
        return x, {}
    if norm.kind == "rms":
        return x, {"norm_weight": norm.weight, "norm_eps": norm.eps, "norm_offset": norm.offset}
    return norm(x), {}


def _weight(linear: Linear) -> Tensor:
    return cast(Tensor, linear.weight)
