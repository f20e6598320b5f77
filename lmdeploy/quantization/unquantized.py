"""Weights kept as plain matrices in the compute dtype. It knows no checkpoint format; it undoes affine and scaled parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmdeploy.kernels import cpu, runs_on_gpu
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
        self._has_gpu_kernel = False

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
        self._has_gpu_kernel = runs_on_gpu(weight)

    def apply(self, linear: Linear, x: Tensor, *, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        weight = _weight(linear)
        if self._has_gpu_kernel:
            from lmdeploy.kernels.cuda import dense

            x, fused = fused_norm(x, norm)
            return dense.linear(x, weight, bias=linear.bias, residual=residual, **fused)
        if self._has_cpu_kernel and cpu.can_multiply_dense(weight, len(x)):
            x, fused = fused_norm(x, norm)
            return cpu.dense_linear(x, weight, bias=linear.bias, residual=residual, **fused)
        out = F.linear(x if norm is None else norm(x), weight, linear.bias)
        return out if residual is None else out.add_(residual)

    def logits(self, linear: Linear, x: Tensor) -> Tensor:
        if not self._has_gpu_kernel:
            return super().logits(linear, x)
        from lmdeploy.kernels.cuda import dense

        return dense.linear(x, _weight(linear), bias=linear.bias, out_dtype=torch.float32)

    def gated_mlp(
        self, x: Tensor, norm: Norm | None, gate_up: Linear, down: Linear, activation: str, residual: Tensor | None
    ) -> Tensor:
        if not (self._has_gpu_kernel and isinstance(down.method, UnquantizedMethod)):
            return super().gated_mlp(x, norm, gate_up, down, activation, residual)
        from lmdeploy.kernels.cuda import dense

        x, fused = fused_norm(x, norm)
        biases = {"gate_up_bias": gate_up.bias, "down_bias": down.bias}
        return dense.gated_mlp(x, _weight(gate_up), _weight(down), activation, residual=residual, **biases, **fused)

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
