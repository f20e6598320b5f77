"""Linear layers over 16-bit weights on the GPU: a kernel of our own for few tokens, cuBLAS for many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lmdeploy.kernels.cuda import skinny_gemm
from lmdeploy.kernels.cuda.skinny_gemm import Weight

MAX_TOKENS = 16
_HAS_WIDE_OUTPUT = "dtype" in torch.ops.aten.mm.overloads()  # since torch 2.8
MAX_NORM_TOKENS = 8  # beyond them a norm of its own is faster than one in front of each block's product


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """rms_norm(x) W^T + bias + residual, weight [N, K]: [M, K] -> [M, N]; the result may take the residual's place."""
    n, k = weight.shape
    if len(x) <= MAX_TOKENS and skinny_gemm.supports(n, k, x.dtype, x.device):
        x, fused = front_norm(x, norm_weight, norm_eps, norm_offset)
        return skinny_gemm.skinny_gemm(
            x, Weight(weight, n, k), bias=bias, residual=residual, out_dtype=out_dtype, out=residual, **fused
        )
    return matmul(normalize(x, norm_weight, norm_eps, norm_offset), weight, bias, residual, out_dtype)


def gated_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """down(activation(gate) * up) + residual with gate | up = gate_up(rms_norm(x)): [M, C] -> [M, C]."""
    n, k = gate_up.shape
    if len(x) <= MAX_TOKENS and n % 32 == 0 and skinny_gemm.supports(n, k, x.dtype, x.device):
        x, fused = front_norm(x, norm_weight, norm_eps, norm_offset)
        hidden = skinny_gemm.skinny_gemm(x, Weight(gate_up, n, k), bias=gate_up_bias, activation=activation, **fused)
    else:
        from lmdeploy.kernels import gated_activation

        x = normalize(x, norm_weight, norm_eps, norm_offset)
        hidden = gated_activation(matmul(x, gate_up, gate_up_bias, None, None), activation)
    return linear(hidden, down, bias=down_bias, residual=residual)


def matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    """x W^T + bias + residual by cuBLAS; without a bias the residual is added by the product itself, in its place."""
    if bias is None and residual is not None:
        return residual.addmm_(x, weight.T)
    if out_dtype == torch.float32 and bias is None and _HAS_WIDE_OUTPUT:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    out = F.linear(x, weight, bias)
    if residual is not None:
        out = out.add_(residual)
    return out if out_dtype is None else out.to(out_dtype)


def front_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, dict[str, Any]]:
    """x and the norm's arguments for a kernel that runs it itself; for more tokens than that pays for, x normalized."""
    if weight is not None and len(x) <= MAX_NORM_TOKENS:
        return x, {"norm_weight": weight, "norm_eps": eps, "norm_offset": offset}
    return normalize(x, weight, eps, offset), {}


def normalize(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """The RMS norm of x, if there is one."""
    if weight is None:
        return x
    from lmdeploy.kernels import rms_norm

    return rms_norm(x, weight, eps, offset)
