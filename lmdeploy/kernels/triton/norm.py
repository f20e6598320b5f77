# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""RMS norms, one program per row. It knows no model and no norm with a mean."""

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
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    num_rows, columns = rows.shape
    if columns > _MAX_COLUMNS:
        raise ValueError(f"rows of {columns} columns are too long for one program; at most {_MAX_COLUMNS}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(columns)
        sizes = (rows.stride(0), columns, float(eps), float(offset))
        num_warps = min(16, max(1, block // 512))
        _rms_norm_kernel[(num_rows,)](rows, weight, out, *sizes, BLOCK=block, num_warps=num_warps)
    return out


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, x_stride, C, eps, offset, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + offset
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / C + eps)
    tl.store(out_ptr + row * C + columns, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)
