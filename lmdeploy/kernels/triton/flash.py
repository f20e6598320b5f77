# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Causal attention of ragged requests over keys and values that lie one after the other; the plain case, for speed.

It knows no blocks, windows, biases or sinks. FlashAttention-2, https://arxiv.org/abs/2307.08691
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, warps and pipeline stages of a program."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


CONFIGS = {64: Config(128, 128, 8, 3), 128: Config(128, 64, 8, 3)}  # by the elements of a head


def supports(q: Tensor) -> bool:
    """Whether heads [T, H, D] have a size that the kernel takes, in 16 bits."""
    return q.shape[-1] in CONFIGS and q.dtype in (torch.float16, torch.bfloat16)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    max_query_len: int,
    scale: float,
    config: Config | None = None,
) -> Tensor:
    """q [T, H, D], k, v [S, Hkv, D] -> [T, H, D]; a request's queries are the last of its keys.

    starts_q, starts_k: [B + 1] int32, where each request's queries and keys begin.
    """
    heads, dim = q.shape[1:]
    config = config or CONFIGS[dim]
    out = torch.empty_like(q)
    grid = (heads, triton.cdiv(max_query_len, config.rows), len(starts_q) - 1)
    _flash[grid](
        q,
        k,
        v,
        out,
        starts_q,
        starts_k,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        scale * math.log2(math.e),
        HEADS=heads,
        GROUP=heads // k.shape[1],
        D=dim,
        ROWS=config.rows,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


@triton.jit
def _flash(
    q_ptr, k_ptr, v_ptr, out_ptr, starts_q_ptr, starts_k_ptr, q_stride, k_stride, v_stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program ROWS queries of one head; the rows with most keys first."""
    head, request = tl.program_id(0), tl.program_id(2)
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    q_start = tl.load(starts_q_ptr + request)
    q_len = tl.load(starts_q_ptr + request + 1) - q_start
    if first_row >= q_len:
        return
    k_start = tl.load(starts_k_ptr + request)
    k_len = tl.load(starts_k_ptr + request + 1) - k_start
    rows, columns, d = first_row + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, D)
    live = rows < q_len
    q_at = q_ptr + (q_start + rows).to(tl.int64)[:, None] * q_stride + head * D + d[None, :]
    q = tl.load(q_at, mask=live[:, None], other=0.0)
    kv_head = head // GROUP
    k_at = k_ptr + k_start.to(tl.int64) * k_stride + kv_head * D + columns[None, :] * k_stride + d[:, None]
    v_at = v_ptr + k_start.to(tl.int64) * v_stride + kv_head * D + columns[:, None] * v_stride + d[None, :]
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    before = k_len - q_len + first_row  # keys that every row of the tile sees
    full = before // COLUMNS * COLUMNS
    for _ in tl.range(0, full, COLUMNS):
        scores = tl.dot(q, tl.load(k_at))
        m_next = tl.maximum(m, tl.max(scores, 1) * scale)
        p = tl.exp2(scores * scale - m_next[:, None])
        shrink = tl.exp2(m - m_next)
        mass = mass * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v_ptr.dtype.element_ty), tl.load(v_at), acc * shrink[:, None])
        m = m_next
        k_at += COLUMNS * k_stride
        v_at += COLUMNS * v_stride
    position = k_len - q_len + rows
    for start in tl.range(full, tl.minimum(before + ROWS, k_len), COLUMNS):
        n = start + columns
        there = n < k_len
        scores = tl.dot(q, tl.load(k_at, mask=there[None, :], other=0.0)) * scale
        scores = tl.where(n[None, :] <= position[:, None], scores, float("-inf"))
        m_next = tl.maximum(m, tl.max(scores, 1))  # finite: a row sees its tile's first key, or has seen one before
        p = tl.exp2(scores - m_next[:, None])
        shrink = tl.exp2(m - m_next)
        mass = mass * shrink + tl.sum(p, 1)
        v = tl.load(v_at, mask=there[:, None], other=0.0)
        acc = tl.dot(p.to(v_ptr.dtype.element_ty), v, acc * shrink[:, None])
        m = m_next
        k_at += COLUMNS * k_stride
        v_at += COLUMNS * v_stride
    out_at = out_ptr + ((q_start + rows).to(tl.int64) * HEADS + head)[:, None] * D + d[None, :]
    tl.store(out_at, (acc / mass[:, None]).to(out_ptr.dtype.element_ty), mask=live[:, None])
