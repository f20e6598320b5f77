"""Linear layers over 8-bit weights with scales in plain PyTorch, on any device: the weight is dequantized for each product."""

from __future__ import annotations

import torch
from torch import Tensor

from lmdeploy.kernels import invariant

_ELEMENTS_AT_A_TIME = {"cpu": 1 << 20}  # the float32 intermediate stays in the cache
_ELEMENTS_ON_A_GPU = 1 << 26


def linear(
    x: Tensor,
    q: Tensor,
    scales: Tensor,
    group_size: int,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T + bias + residual with W = q * scales: x [M, K], residual [M, N] -> [M, N] in out_dtype (x's).

    q: 8-bit floats or integers [N, K]; scales: float32 [N, ceil(K / group_size)].
    """
    out = invariant.linear(x, dequantize(q, scales, group_size, x.dtype), bias)
    if residual is not None:
        out = out + residual
    return out if out_dtype is None else out.to(out_dtype)


def embed(ids: Tensor, q: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """Rows ids [T] of the weight: [T, K] in dtype."""
    rows = q.view(torch.uint8)[ids].view(q.dtype)
    return dequantize(rows, scales[ids], group_size, dtype)


def dequantize(q: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """q * scales, [N, K] in dtype, computed in float32."""
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    dequantize_into(out, q, scales, group_size)
    return out


def dequantize_into(out: Tensor, q: Tensor, scales: Tensor, group_size: int) -> None:
    """`dequantize` into out [N, K], of any float dtype and device."""
    rows, columns = q.shape
    step = max(1, _ELEMENTS_AT_A_TIME.get(q.device.type, _ELEMENTS_ON_A_GPU) // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        factors = scales[part]
        if scales.shape[1] > 1:
            factors = factors.repeat_interleave(group_size, dim=1)[:, :columns]
        out[part] = q[part].float() * factors
