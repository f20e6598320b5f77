"""Weights kept as plain matrices in the compute dtype. It knows no checkpoint format; it undoes affine and scaled parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmdeploy.kernels import cpu
from lmdeploy.quantization.method import LinearMethod

if TYPE_CHECKING:
    from lmdeploy.layers.linear import Linear
    from lmdeploy.layers.norm import Norm
    from lmdeploy.quantization.packing import AffineTensor
    from lmdeploy.quantization.scaled import ScaledTensor


class UnquantizedMethod(LinearMethod):
    """The weight is a parameter [N, K] of the linear; quantized parts of a checkpoint are dequantized on their way into it."""

    name = "unquantized"

    def __init__(self) -> None:
        self._has_cpu_kernel = False

    def load(
        self,
        linear: Linear,
        part: int,
        value: Tensor | AffineTensor | ScaledTensor,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
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

    def finish(self, linear: Linear) -> None:
        weight = _weight(linear)
        self._has_cpu_kernel = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and cpu.is_available()

    def apply(self, linear: Linear, x: Tensor, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        weight = _weight(linear)
        if self._has_cpu_kernel and cpu.can_multiply_dense(weight, len(x)):
            x, fused = fused_norm(x, norm)
            return cpu.dense_linear(x, weight, bias=linear.bias, residual=residual, **fused)
        out = F.linear(x if norm is None else norm(x), weight, linear.bias)
        return out if residual is None else out.add_(residual)

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
