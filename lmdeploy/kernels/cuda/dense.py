"""Linear layers over 16-bit weights on the GPU: kernels of our own for few tokens, cuBLAS for many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmdeploy.kernels import invariant
from lmdeploy.kernels.cuda import batch_gemm, stream_gemm, tensor_gemm

_HAS_WIDE_OUTPUT = "dtype" in torch.ops.aten.mm.overloads()  # since torch 2.8
MAX_NORM_TOKENS = 8  # beyond them a norm of its own is faster than one in front of each block's product
_STREAMED_TOKENS = 2  # up to which x is multiplied fast enough without the tensor cores, whatever its length
_STREAMED_COLUMNS = 2048  # for stream_gemm.MAX_TOKENS


@invariant.at_most(tensor_gemm.MAX_TOKENS)
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
    rest: dict[str, Any] = {"bias": bias, "residual": residual, "out_dtype": out_dtype}
    if is_streamed(x, weight):
        norm = {"norm_weight": norm_weight, "norm_eps": norm_eps, "norm_offset": norm_offset}
        return stream_gemm.stream_gemm(x, weight, out=residual, **rest, **norm)  # type: ignore[arg-type]
    return product(normalize(x, norm_weight, norm_eps, norm_offset), weight, **rest)


@invariant.at_most(tensor_gemm.MAX_TOKENS)
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
    if is_streamed(x, gate_up):
        norm = {"norm_weight": norm_weight, "norm_eps": norm_eps, "norm_offset": norm_offset}
        hidden = stream_gemm.stream_gemm(x, gate_up, bias=gate_up_bias, activation=activation, **norm)  # type: ignore[arg-type]
    else:
        x = normalize(x, norm_weight, norm_eps, norm_offset)
        hidden = product(x, gate_up, bias=gate_up_bias, activation=activation)
    return linear(hidden, down, bias=down_bias, residual=residual)


def product(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T + bias + residual, or activation(gate) * up of its halves, by the fastest kernel that multiplies matrices.

    The weight may be read before kernels in front have ended: it must be none's result.
    """
    epilogue: dict[str, Any] = {"bias": bias, "residual": residual, "activation": activation, "out_dtype": out_dtype}
    tiling = None if invariant.applies(len(x)) else batch_gemm.tiling_for(x, weight, activation is not None)
    if tiling is not None:
        return batch_gemm.batch_gemm(x, weight, tiling, out=residual, **epilogue)
    if is_for_tensor_cores(x, weight, activation is not None):
        return tensor_gemm.tensor_gemm(x, weight, out=residual, **epilogue)
    y = matmul(x, weight, bias, residual, out_dtype)
    if activation is None:
        return y
    from lmdeploy.kernels import gated_activation

    return gated_activation(y, activation)


def is_for_tensor_cores(x: Tensor, weight: Tensor, is_gated: bool = False) -> bool:
    """Whether Hopper's own kernel can and should: its sums have the same order whatever the number of tokens."""
    if not tensor_gemm.supports(x, weight, is_gated):
        return False
    n, k = weight.shape
    return invariant.applies(len(x)) or tensor_gemm.is_faster(len(x), n, k, is_gated)


def is_streamed(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel for the fewest tokens runs: always where it is the only one, or is the faster one."""
    if not stream_gemm.supports(x, weight) or invariant.applies(len(x)):
        return False
    return len(x) <= _STREAMED_TOKENS or weight.shape[1] <= _STREAMED_COLUMNS or not tensor_gemm.has_instructions()


def matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    """x W^T + bias + residual by cuBLAS; without a bias the residual is added by the product itself, in its place."""
    is_one_call = bias is None and not invariant.applies(len(x))
    if is_one_call and residual is not None:
        return residual.addmm_(x, weight.T)
    if is_one_call and out_dtype == torch.float32 and _HAS_WIDE_OUTPUT:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    out = invariant.linear(x, weight, bias)
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
