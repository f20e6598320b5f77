# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Causal attention of any number of new tokens per request over the blocked cache. It writes no cache.

On Hopper the usual forms run in CUDA C++ (kernels/cuda/prefill_attention.py). Elsewhere torch's flash attention does what it
can, on one run of keys and values per request that is copied from the cache; the kernel below does the rest.
FlashAttention-2, https://arxiv.org/abs/2307.08691
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.kernels.cuda import prefill_attention as hopper
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.kernels.triton.scores import biased, softcapped
from lmdeploy.kernels.triton.stored import Blocks, Side, float8_factor, float8_to, hadamard, minimum_of, scale_of, side

FLASH_MAX_DIM = 256
GATHER_TILE = 64


def prefill_attention(
    q: Tensor,
    keys: Blocks,
    values: Blocks,
    cu_seqlens_q: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    max_context_len: int,
    total_context: int,
    spec: AttentionSpec,
    *,
    cu_seqlens_k: Tensor | None = None,
    dtype: torch.dtype | None = None,
    may_use_torch: bool = True,
) -> Tensor:
    """New tokens that are the last of each request's context: q [T, H, D] -> [T, H, Dv] in `dtype`, else in q's.

    q: in the basis of the stored keys, as `rope_store` returns it. keys, values: [NB, Hkv, S, D] or quantized; values may be
    the first Dv elements of keys (latent attention). cu_seqlens_q: [B + 1] int32. block_tables: [B, max_blocks] int32.
    context_lens: [B] int32, the new tokens included; max_context_len and total_context (their sum) on the host.
    cu_seqlens_k: [B + 1] int32, their running sum, if it is there already. may_use_torch: else the kernel below does it all.
    """
    k, v = side(keys, q.shape[-1]), side(values, spec.value_dim)
    use_torch = may_use_torch and _torch_can(q, spec)
    dtype = dtype or q.dtype
    if use_torch and k.format == v.format == "plain" and hopper.supports(spec, q, k.codes, v.codes):
        requests = (cu_seqlens_q, block_tables, context_lens, max_query_len)
        out = hopper.prefill_attention(q, k.codes, v.codes, *requests, spec)
    elif k.format == "plain" and not use_torch:
        out = _flash(q, k, v, cu_seqlens_q, None, block_tables, context_lens, max_query_len, spec)
    else:
        starts = cu_seqlens_k if cu_seqlens_k is not None else running_sum(context_lens)
        sizes = (max_context_len, total_context)
        linear_k, linear_v = (_gather(part, block_tables, starts, sizes, q.shape[-1], q.dtype) for part in (k, v))
        if use_torch:
            out = _torch_flash(q, linear_k, linear_v, cu_seqlens_q, starts, max_query_len, max_context_len, spec)
        else:
            k_run, v_run = (Side(x, x, "plain", 1) for x in (linear_k, linear_v))
            out = _flash(q, k_run, v_run, cu_seqlens_q, starts, block_tables, context_lens, max_query_len, spec)
    return out.to(dtype) if v.piece == 1 else _turn_back(out, v.piece, dtype)


def _torch_can(q: Tensor, spec: AttentionSpec) -> bool:
    plain = spec.softcap is None and spec.alibi_slopes is None and spec.sinks is None
    dim = q.shape[-1]
    fits = (
        dim <= FLASH_MAX_DIM and dim % 8 == 0 and spec.value_dim == dim and q.dtype in (torch.float16, torch.bfloat16)
    )
    return plain and fits and q.is_cuda


def running_sum(context_lens: Tensor) -> Tensor:
    """[B] -> [B + 1] int32, from 0."""
    return torch.nn.functional.pad(context_lens.cumsum(0, dtype=torch.int32), (1, 0))


def _torch_flash(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int, spec: AttentionSpec
) -> Tensor:
    """torch's FlashAttention-2 over ragged runs; its causal mask aligns the last query with the last key."""
    sides = {} if spec.window is None else {"window_size_left": spec.window - 1, "window_size_right": 0}
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, starts_q, starts_k, max_q, max_k, 0.0, True, False, scale=spec.scale, **sides
    )[0]
    return out


def _gather(
    part: Side, block_tables: Tensor, starts: Tensor, sizes: tuple[int, int], dim: int, dtype: torch.dtype
) -> Tensor:
    """Keys or values of a step's requests one after the other, [total_context, Hkv, D], dequantized but not turned back."""
    max_context_len, total_context = sizes
    kv_heads, block_size = part.codes.shape[1:3]
    out = torch.empty(total_context, kv_heads, dim, dtype=dtype, device=part.codes.device)
    _gather_kernel[(triton.cdiv(max_context_len, GATHER_TILE), block_tables.shape[0], kv_heads)](
        part.codes,
        part.params,
        block_tables,
        starts,
        out,
        block_tables.stride(0),
        *part.codes.stride()[:2],
        *part.params.stride()[:2],
        KV_HEADS=kv_heads,
        D=dim,
        DP=triton.next_power_of_2(dim // 2 if part.format == "int4" else dim),
        BLOCK_SIZE=block_size,
        TILE=GATHER_TILE,
        FORMAT=part.format,
        num_warps=4,
    )
    return out


def _flash(
    q: Tensor,
    k: Side,
    v: Side,
    cu_seqlens_q: Tensor,
    starts_k: Tensor | None,
    block_tables: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    spec: AttentionSpec,
) -> Tensor:
    """The own kernel over blocks [NB, Hkv, S, D], or over runs [total_context, Hkv, D] that begin at starts_k [B + 1]."""
    heads, dim = q.shape[1:]
    is_latent = k.codes.data_ptr() == v.codes.data_ptr()
    main = spec.value_dim if is_latent else dim
    is_blocked = starts_k is None
    out = q.new_empty(q.shape[0], heads, spec.value_dim)
    rows, columns, num_warps, num_stages = _tiles(q.dtype, dim)
    _flash_kernel[(triton.cdiv(max_query_len, rows), heads, block_tables.shape[0])](
        q,
        k.codes,
        v.codes,
        out,
        cu_seqlens_q,
        starts_k if starts_k is not None else cu_seqlens_q,
        context_lens,
        block_tables,
        spec.sinks if spec.sinks is not None else out,
        spec.alibi_slopes if spec.alibi_slopes is not None else out,
        q.stride(0),
        block_tables.stride(0),
        *(k.codes.stride()[:2] if is_blocked else (0, dim)),
        *(v.codes.stride()[:2] if is_blocked else (0, spec.value_dim)),
        spec.scale,
        spec.softcap or 0.0,
        spec.window or 0,
        HEADS=heads,
        KV_HEADS=spec.num_kv_heads,
        D=dim,
        MAIN=main,
        DV=spec.value_dim,
        KP=triton.next_power_of_2(main),
        VP=triton.next_power_of_2(spec.value_dim),
        K_STRIDE=dim if is_blocked else spec.num_kv_heads * dim,
        V_STRIDE=(dim if is_latent else spec.value_dim) if is_blocked else spec.num_kv_heads * spec.value_dim,
        IS_BLOCKED=is_blocked,
        BLOCK_SIZE=k.codes.shape[2] if is_blocked else 1,
        ROWS=rows,
        TILE=columns,
        IS_LATENT=is_latent,
        HAS_WINDOW=spec.window is not None,
        HAS_SOFTCAP=spec.softcap is not None,
        ALIBI=0 if spec.alibi_slopes is None else 1 + spec.alibi_unscaled,
        HAS_SINKS=spec.sinks is not None,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


def _tiles(dtype: torch.dtype, dim: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, pipeline stages: what fits into registers and shared memory."""
    if dtype == torch.float32:
        return (32, 32, 4, 2) if dim <= 128 else (16, 16, 4, 1)
    if dim <= 128:
        return 128, 64, 8, 3
    return (64, 64, 8, 2) if dim <= 256 else (32, 32, 8, 1)


def _turn_back(x: Tensor, piece: int, dtype: torch.dtype) -> Tensor:
    """Vectors [T, H, Dv] from the basis of their values to the model's."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    dim, count, at_once = x.shape[-1], x.shape[0] * x.shape[1], 16
    _turn_back_kernel[(triton.cdiv(count, at_once),)](
        x,
        out,
        count,
        D=dim,
        DP=triton.next_power_of_2(dim),
        PIECE=piece,
        STAGES=piece.bit_length() - 1,
        AT_ONCE=at_once,
    )
    return out


@triton.jit
def _turn_back_kernel(
    x_ptr, out_ptr, count,
    D: tl.constexpr, DP: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)[:, None]
    d = tl.arange(0, DP)[None, :]
    mask = (row < count) & (d < D)
    where = row.to(tl.int64) * D + d
    x = tl.load(x_ptr + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + where, hadamard(x, PIECE, STAGES).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gather_kernel(
    codes_ptr, params_ptr, tables_ptr, starts_ptr, out_ptr, table_stride, block_stride, head_stride,
    params_block_stride, params_head_stride,
    KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    row, kv_head = tl.program_id(1), tl.program_id(2)
    start = tl.load(starts_ptr + row)
    length = tl.load(starts_ptr + row + 1) - start
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if tl.program_id(0) * TILE < length:
        there = n < length
        d = tl.arange(0, DP)[None, :]
        WIDTH: tl.constexpr = D // 2 if FORMAT == "int4" else D
        block = tl.load(tables_ptr + row * table_stride + n // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        offset = n % BLOCK_SIZE
        mask = there[:, None] & (d < WIDTH)
        where = block * block_stride + kv_head * head_stride + offset * WIDTH
        codes = tl.load(codes_ptr + where[:, None] + d, mask=mask, other=0)
        target = out_ptr + ((start + n).to(tl.int64) * KV_HEADS + kv_head)[:, None] * D + d
        if FORMAT == "plain":
            tl.store(target, codes.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            where = block * params_block_stride + kv_head * params_head_stride + offset
            params = tl.load(params_ptr + where, mask=there, other=0)
            scale, minimum = scale_of(params)[:, None], minimum_of(params)[:, None]
            if FORMAT == "int4":
                low, high = (codes & 15).to(tl.float32) * scale + minimum, (codes >> 4).to(tl.float32) * scale + minimum
                tl.store(target, low.to(out_ptr.dtype.element_ty), mask=mask)
                tl.store(target + WIDTH, high.to(out_ptr.dtype.element_ty), mask=mask)
            elif FORMAT == "int8":
                tl.store(target, (codes.to(tl.float32) * scale + minimum).to(out_ptr.dtype.element_ty), mask=mask)
            else:
                numbers = float8_to(codes, FORMAT, tl.float32) * (scale * float8_factor(FORMAT))
                tl.store(target, numbers.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _flash_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, starts_q_ptr, starts_k_ptr, context_lens_ptr, tables_ptr, sinks_ptr, slopes_ptr,
    q_stride, table_stride, k_block_stride, k_head_stride, v_block_stride, v_head_stride, scale, softcap, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, DV: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, IS_BLOCKED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, IS_LATENT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One program ROWS queries of one head; the longest rows first."""
    head, row = tl.program_id(1), tl.program_id(2)
    kv_head = head // (HEADS // KV_HEADS)
    q_start = tl.load(starts_q_ptr + row)
    q_len = tl.load(starts_q_ptr + row + 1) - q_start
    context_len = tl.load(context_lens_ptr + row)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    if first_row < q_len:
        i = first_row + tl.arange(0, ROWS)
        live = i < q_len
        position = context_len - q_len + i
        k_columns, v_columns = tl.arange(0, KP), tl.arange(0, VP)
        q_rows = q_ptr + (q_start + i).to(tl.int64)[:, None] * q_stride + head * D
        q = tl.load(q_rows + k_columns[None, :], mask=live[:, None] & (k_columns < MAIN)[None, :], other=0.0)
        q = q.to(k_ptr.dtype.element_ty)
        if D > MAIN:
            tail = MAIN + tl.arange(0, D - MAIN)
            q_tail = tl.load(q_rows + tail[None, :], mask=live[:, None], other=0.0).to(k_ptr.dtype.element_ty)
        k_ptr += kv_head * k_head_stride
        v_ptr += kv_head * v_head_stride
        if not IS_BLOCKED:
            k_ptr += tl.load(starts_k_ptr + row).to(tl.int64) * K_STRIDE
            v_ptr += tl.load(starts_k_ptr + row).to(tl.int64) * V_STRIDE
        slopes = tl.zeros((ROWS,), tl.float32)
        if ALIBI > 0:
            slopes += tl.load(slopes_ptr + head)
        m = tl.full((ROWS,), float("-inf"), tl.float32)
        mass = tl.zeros((ROWS,), tl.float32)
        if HAS_SINKS:
            m = tl.zeros((ROWS,), tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
            mass += 1.0
        acc = tl.zeros((ROWS, VP), tl.float32)
        end = tl.minimum(context_len, context_len - q_len + first_row + ROWS)
        first = tl.maximum(context_len - q_len + first_row - window + 1, 0) if HAS_WINDOW else 0
        for start in tl.range(first // TILE * TILE, end, TILE):
            n = start + tl.arange(0, TILE)
            there = n < context_len
            if IS_BLOCKED:
                block = tl.load(tables_ptr + row * table_stride + n // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
                k_offset = block * k_block_stride + n % BLOCK_SIZE * K_STRIDE
                v_offset = block * v_block_stride + n % BLOCK_SIZE * V_STRIDE
            else:
                k_offset, v_offset = n.to(tl.int64) * K_STRIDE, n.to(tl.int64) * V_STRIDE
            # Blocks in front of every window may have another owner by now; what lies there must not reach a product.
            wanted = there & (n >= first)
            k_mask = wanted[:, None] & (k_columns < MAIN)[None, :]
            k = tl.load(k_ptr + k_offset[:, None] + k_columns[None, :], mask=k_mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if D > MAIN:
                k_tail = tl.load(k_ptr + k_offset[:, None] + tail[None, :], mask=wanted[:, None], other=0.0)
                scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
            scores = softcapped(scores, scale, softcap, HAS_SOFTCAP)
            if ALIBI > 0:
                scores = biased(scores, slopes, n, scale, ALIBI)
            visible = (n[None, :] <= position[:, None]) & wanted[None, :]
            if HAS_WINDOW:
                visible = visible & (n[None, :] > position[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
            m_next = tl.maximum(m, tl.max(scores, axis=1))
            # A row of which nothing is visible yet keeps -inf, and -inf minus itself is NaN.
            basis = tl.where(m_next == float("-inf"), 0.0, m_next)
            shrink = tl.exp2(m - basis)
            p = tl.exp2(scores - basis[:, None])
            mass = mass * shrink + tl.sum(p, axis=1)
            m = m_next
            acc = acc * shrink[:, None]
            if IS_LATENT:
                acc = tl.dot(p.to(k.dtype), k, acc, input_precision="ieee")
            else:
                v_mask = wanted[:, None] & (v_columns < DV)[None, :]
                v = tl.load(v_ptr + v_offset[:, None] + v_columns[None, :], mask=v_mask, other=0.0)
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        acc = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
        target = out_ptr + ((q_start + i).to(tl.int64) * HEADS + head)[:, None] * DV + v_columns[None, :]
        tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & (v_columns < DV)[None, :])
