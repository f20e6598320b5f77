# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""RMS norms, alone and behind the residual sum, one program per row. It knows no model and no norm with a mean."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_COLUMNS = 16384


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / rms(x) * (offset + weight) over the last dimension; float32 inside, x's dtype outside.

    x: [..., C], C at most 16384, rows at any distance; weight: [C] of any float dtype. Returns a contiguous tensor.
    """
    rows = _as_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(rows, None, weight, None, out, eps, offset)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """The sum x + residual rounded to x's dtype, and the RMS norm of that rounded sum. All [..., C]."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty_like(total)
    _launch(_as_rows(x), _as_rows(residual), weight, total, out, eps, offset)
    return total, out


def _as_rows(x: Tensor) -> Tensor:
    """[..., C] as [T, C] whose rows are dense."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, total: Tensor | None, out: Tensor, eps: float, offset: float
) -> None:
    num_rows, columns = x.shape
    if columns > _MAX_COLUMNS:
        raise ValueError(f"rows of {columns} columns are too long for one program; at most {_MAX_COLUMNS}")
    if num_rows == 0:
        return
    block = triton.next_power_of_2(columns)
    _rms_norm_kernel[(num_rows,)](
        x,
        x if residual is None else residual,
        weight,
        out if total is None else total,
        out,
        x.stride(0),
        x.stride(0) if residual is None else residual.stride(0),
        columns,
        float(eps),
        float(offset),
        ADD=residual is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    x_stride,
    residual_stride,
    C,
    eps,
    offset,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + offset
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * C + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / C + eps)
    tl.store(out_ptr + row * C + columns, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)
