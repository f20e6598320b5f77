# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Gated activations over tiles of columns, so that one row fills the device, too. It knows no linear layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up: [..., 2 I] -> [..., I], gate in the first half; float32 inside.

    activation: silu, gelu (exact) or gelu_tanh. Rows may be at any distance.
    """
    rows = gate_up if gate_up.dim() == 2 else gate_up.reshape(-1, gate_up.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    size = rows.shape[1] // 2
    out = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        grid = (rows.shape[0], triton.cdiv(size, _BLOCK))
        _gated_kernel[grid](rows, out, rows.stride(0), size, ACTIVATION=activation, BLOCK=_BLOCK, num_warps=4)
    return out


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu, gelu (exact) or gelu_tanh of a float32 tile."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh u) / 2 = sigmoid(2 u)
    else:
        tl.static_assert(ACTIVATION == "gelu")
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return y


@triton.jit
def _gated_kernel(gate_up_ptr, out_ptr, stride, SIZE, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    gate = tl.load(gate_up_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + row * SIZE + columns, (activate(gate, ACTIVATION) * up).to(out_ptr.dtype.element_ty), mask=inside
    )
