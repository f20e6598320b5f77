# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: RET505 (in a kernel both ways of a constant condition are written out)
"""From products of queries and keys to powers of two: scale, soft cap, linear bias. It knows no cache.

Scores come out multiplied by log2(e), since exp2 is what the hardware computes.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softcapped(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(scale * scores / softcap), or scale * scores, times log2(e)."""
    if HAS_SOFTCAP:
        grown = tl.exp2(scores * (scale / softcap * (2 * _LOG2_E)))
        return softcap * _LOG2_E * (1.0 - 2.0 / (grown + 1.0))
    else:
        return scores * (scale * _LOG2_E)


@triton.jit
def biased(scores, slopes, n, scale, ALIBI: tl.constexpr):
    """scores [M, N] with slopes [M] times key positions n [N]; ALIBI 2 is the form that is rounded to bfloat16 and scaled."""
    if ALIBI == 2:
        bias = rounded_to_bfloat16(
            rounded_to_bfloat16(slopes)[:, None] * rounded_to_bfloat16(n.to(tl.float32))[None, :]
        )
        return scores + bias * (scale * _LOG2_E)
    else:
        return scores + slopes[:, None] * n.to(tl.float32)[None, :] * _LOG2_E


@triton.jit
def rounded_to_bfloat16(x):
    """float32 numbers that a bfloat16 can hold; in integers, since the interpreter has no bfloat16."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return bits.to(tl.float32, bitcast=True)
