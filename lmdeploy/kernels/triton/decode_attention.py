# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: RET505 (in a kernel both ways of a constant condition are written out)
"""Attention of one new token per request over the blocked cache, one launch a layer. It writes no cache.

A request's keys are cut into splits whose length follows from its own length alone, so that its result does not depend on
the batch. A fixed number of programs walks the list of all splits; whichever finishes a request last adds its parts up in
their order. Flash-decoding, https://pytorch.org/blog/flash-decoding/
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.kernels.triton.scores import biased, softcapped
from lmdeploy.kernels.triton.stored import (
    IS_INTERPRETED,
    Blocks,
    Side,
    element_of,
    float8_factor,
    hadamard,
    in_units,
    minimum_of,
    part_of,
    scale_of,
    side,
)


@dataclass(frozen=True)
class Config:
    """How the kernel is cut: tokens per tile, warps and pipeline stages of a program, programs per multiprocessor."""

    tile: int = 64
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 3


# By format of the keys. Splits are a multiple of every tile.
CONFIGS = {
    "plain": Config(),
    "int8": Config(programs_per_sm=4),
    "int4": Config(programs_per_sm=4),
    "e4m3": Config(programs_per_sm=4),
    "e5m2": Config(programs_per_sm=4),
    "latent": Config(tile=32, num_stages=2, programs_per_sm=1),
}
EXACT = Config(tile=16, num_stages=2)  # of float32, for correctness alone
MAX_TILE_BYTES = 80 << 10  # of shared memory for keys and values under way, so that several programs fit
# A split is the shortest MIN_SPLIT * 2^n tokens of which MAX_SPLITS are enough.
MIN_SPLIT, WHOLE, MAX_SPLITS = 128, 0, 32
QUERY_ROWS = 16  # of an mma; a key-value head's queries fill them as far as they go


@dataclass(frozen=True)
class Scratch:
    """Buffers for any step of up to max_batch requests, shared by all layers of one shape; counters are 0 between launches.

    entries: [max_work, 4] int32: request, its split, tokens of a split, tokens of the request. total: [1] int32 entries in use.
    partials: [max_work, H, Dv] float32. stats: [max_work, H, 2] float32, maximum and sum of the scores' powers of two.
    counters: [max_batch, H] int32, splits that are done. min_split: tokens of the shortest split. whole: requests of up to
    so many tokens are not split.
    """

    entries: Tensor
    total: Tensor
    partials: Tensor
    stats: Tensor
    counters: Tensor
    min_split: int
    whole: int


@dataclass(frozen=True)
class Work:
    """One step's splits. context_lens: [B] int32; those of value 0 are padding, whose output is 0."""

    context_lens: Tensor
    scratch: Scratch


def make_scratch(
    max_batch: int,
    max_context_len: int,
    num_heads: int,
    value_dim: int,
    device: torch.device,
    min_split: int = MIN_SPLIT,
    whole: int = 0,
) -> Scratch:
    """For steps of up to max_batch requests of up to max_context_len tokens each."""
    max_work = max_batch * max(1, min(MAX_SPLITS, -(-max_context_len // min_split)))
    return Scratch(
        entries=torch.zeros(max_work, 4, dtype=torch.int32, device=device),
        total=torch.zeros(1, dtype=torch.int32, device=device),
        partials=torch.empty(max_work, num_heads, value_dim, device=device),
        stats=torch.empty(max_work, num_heads, 2, device=device),
        counters=torch.zeros(max_batch, num_heads, dtype=torch.int32, device=device),
        min_split=min_split,
        whole=whole,
    )


def plan(context_lens: Tensor, scratch: Scratch) -> Work:
    """The splits of a step, written to the scratch: once per step, for all its layers. context_lens: [B] int32."""
    batch = context_lens.shape[0]
    _plan[(batch,)](
        context_lens,
        scratch.entries,
        scratch.total,
        batch,
        BATCH_P=triton.next_power_of_2(batch),
        MIN_SPLIT=scratch.min_split,
        WHOLE=scratch.whole,
        MAX_SPLITS=MAX_SPLITS,
        num_warps=1,
    )
    return Work(context_lens, scratch)


def decode_attention(
    q: Tensor,
    keys: Blocks,
    values: Blocks,
    block_tables: Tensor,
    work: Work,
    spec: AttentionSpec,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """One query per request at position context_len - 1: q [B, H, D] -> [B, H, Dv] in `dtype`, else in q's.

    q: in the basis of the stored keys, as `rope_store` returns it. keys, values: [NB, Hkv, S, D], both plain, both quantized,
    or one tensor as keys [NB, 1, S, D] and its first Dv elements as values (latent attention). block_tables: [B, max_blocks]
    int32. May be captured in a graph and replayed for every length that the scratch was made for.
    """
    batch, heads, dim = q.shape
    k, v = (in_units(side(*part)) for part in ((keys, dim), (values, spec.value_dim)))
    is_latent = k.codes.data_ptr() == v.codes.data_ptr()
    config = _config_for(q.dtype, k, v, is_latent)
    block_size = k.codes.shape[2]
    group = heads // spec.num_kv_heads
    items_per_split = spec.num_kv_heads * triton.cdiv(group, QUERY_ROWS)
    out = q.new_empty(batch, heads, spec.value_dim, dtype=dtype or q.dtype)
    scratch = work.scratch
    most = batch * (scratch.entries.shape[0] // scratch.counters.shape[0]) * items_per_split
    main_dim = spec.value_dim if is_latent else dim
    reduce_rows = triton.next_power_of_2(min(group, QUERY_ROWS))
    value_p = triton.next_power_of_2(spec.value_dim)
    _decode[(min(most, _programs(q.device, config)),)](
        q,
        k.codes,
        k.params,
        v.codes,
        v.params,
        block_tables,
        scratch.entries,
        scratch.total,
        out,
        scratch.partials,
        scratch.stats,
        scratch.counters,
        spec.sinks if spec.sinks is not None else scratch.stats,
        spec.alibi_slopes if spec.alibi_slopes is not None else scratch.stats,
        q.stride(0),
        block_tables.stride(0),
        *k.codes.stride()[:2],
        *v.codes.stride()[:2],
        *k.params.stride()[:2],
        *v.params.stride()[:2],
        spec.scale,
        spec.softcap or 0.0,
        spec.window or 0,
        HEADS=heads,
        KV_HEADS=spec.num_kv_heads,
        D=dim,
        MAIN=main_dim,
        DV=spec.value_dim,
        KP=_padded(main_dim, k.format),
        VP=_padded(spec.value_dim, v.format),
        REDUCE_ROWS=reduce_rows,
        REDUCE_DIM=value_p,
        REDUCE_SPLITS=min(MAX_SPLITS, max(1, 4096 // (reduce_rows * value_p))),
        BLOCK_SIZE=block_size,
        TILE=config.tile,
        ONE_BLOCK=block_size % config.tile == 0,
        ROWS=QUERY_ROWS,
        MAX_SPLITS=MAX_SPLITS,
        K_FORMAT=k.format,
        V_FORMAT=v.format,
        IS_LATENT=is_latent,
        V_PIECE=v.piece,
        V_STAGES=v.piece.bit_length() - 1,
        HAS_WINDOW=spec.window is not None,
        HAS_SOFTCAP=spec.softcap is not None,
        ALIBI=0 if spec.alibi_slopes is None else 1 + spec.alibi_unscaled,
        HAS_SINKS=spec.sinks is not None,
        ASM=not IS_INTERPRETED,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def _config_for(dtype: torch.dtype, k: Side, v: Side, is_latent: bool) -> Config:
    if dtype == torch.float32:
        return EXACT
    config = CONFIGS["latent" if is_latent else k.format]
    row_bytes = sum(part.codes.element_size() * triton.next_power_of_2(part.codes.shape[-1]) for part in (k, v))
    is_too_deep = not is_latent and config.tile * row_bytes * (config.num_stages - 1) > MAX_TILE_BYTES
    return replace(config, num_stages=2) if is_too_deep else config


def _padded(dim: int, format: str) -> int:
    """Columns of a tile: elements, or 16-bit units of two or four codes."""
    return max(16, triton.next_power_of_2(dim // (1 if format == "plain" else 4 if format == "int4" else 2)))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _programs(device: torch.device, config: Config) -> int:
    return config.programs_per_sm * _multiprocessors(device) if device.type == "cuda" else 3


@triton.jit
def _plan(
    context_lens_ptr, entries_ptr, total_ptr, batch,
    BATCH_P: tl.constexpr, MIN_SPLIT: tl.constexpr, WHOLE: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """One program a request: where its splits begin in the list, and the splits."""
    row = tl.program_id(0)
    rows = tl.arange(0, BATCH_P)
    lengths = tl.load(context_lens_ptr + rows, mask=rows < batch, other=0)
    tokens = tl.full((BATCH_P,), MIN_SPLIT, tl.int32)
    for _ in tl.static_range(20):
        tokens = tl.where(tokens * MAX_SPLITS < lengths, tokens * 2, tokens)
    tokens = tl.where(lengths <= WHOLE, tl.maximum(tokens, WHOLE), tokens)  # never 0, also of padding
    splits = tl.where(rows < batch, tl.maximum((lengths + tokens - 1) // tokens, 1), 0)
    first = tl.sum(tl.where(rows < row, splits, 0))
    own_splits = tl.sum(tl.where(rows == row, splits, 0))
    split = tl.arange(0, MAX_SPLITS)
    entry = entries_ptr + (first + split) * 4
    live = split < own_splits
    tl.store(entry, tl.zeros_like(split) + row, mask=live)
    tl.store(entry + 1, split, mask=live)
    tl.store(entry + 2, tl.zeros_like(split) + tl.sum(tl.where(rows == row, tokens, 0)), mask=live)
    tl.store(entry + 3, tl.zeros_like(split) + tl.sum(tl.where(rows == row, lengths, 0)), mask=live)
    if row == 0:
        tl.store(total_ptr, tl.sum(splits))


@triton.jit
def _load_rows(
    ptr, row_offset, visible, columns,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """[TILE, PADDED] of the cache; what lies beyond WIDTH columns is 0, and with MASK_ROWS also rows that are not visible."""
    pointers = ptr + row_offset[:, None] + columns[None, :]
    if MASK_ROWS and WIDTH != PADDED:
        return tl.load(pointers, mask=visible[:, None] & (columns < WIDTH)[None, :], other=0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=visible[:, None], other=0)
    elif WIDTH != PADDED:
        return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0)
    else:
        return tl.load(pointers)


@triton.jit
def _decode(
    q_ptr, k_ptr, k_params_ptr, v_ptr, v_params_ptr, tables_ptr, entries_ptr, total_ptr, out_ptr,
    partials_ptr, stats_ptr, counters_ptr, sinks_ptr, slopes_ptr, q_stride, table_stride,
    k_block_stride, k_head_stride, v_block_stride, v_head_stride,
    k_params_block_stride, k_params_head_stride, v_params_block_stride, v_params_head_stride,
    scale, softcap, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, DV: tl.constexpr,
    KP: tl.constexpr, VP: tl.constexpr, REDUCE_ROWS: tl.constexpr, REDUCE_DIM: tl.constexpr,
    REDUCE_SPLITS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, ONE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, MAX_SPLITS: tl.constexpr, K_FORMAT: tl.constexpr, V_FORMAT: tl.constexpr,
    IS_LATENT: tl.constexpr, V_PIECE: tl.constexpr, V_STAGES: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    Q_TILES: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    ITEMS: tl.constexpr = KV_HEADS * Q_TILES
    V_PARTS: tl.constexpr = 1 if V_FORMAT == "plain" else 4 if V_FORMAT == "int4" else 2
    total = tl.load(total_ptr) * ITEMS
    for item in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1):
        slot = item // ITEMS
        kv_head = (item % ITEMS) // Q_TILES
        first_of_group = (item % Q_TILES) * ROWS
        row = tl.load(entries_ptr + slot * 4)
        split = tl.load(entries_ptr + slot * 4 + 1)
        tokens = tl.load(entries_ptr + slot * 4 + 2)
        context_len = tl.load(entries_ptr + slot * 4 + 3)
        first_visible = tl.maximum(context_len - window, 0) if HAS_WINDOW else 0
        first_split = first_visible // tokens
        splits = tl.maximum((context_len + tokens - 1) // tokens, 1)
        if split >= first_split:
            first_head = kv_head * GROUP + first_of_group
            acc, acc_1, acc_2, acc_3, m, mass = _attend_split(
                q_ptr + row.to(tl.int64) * q_stride, tables_ptr + row.to(tl.int64) * table_stride, first_head,
                GROUP - first_of_group, k_ptr + kv_head * k_head_stride, k_params_ptr + kv_head * k_params_head_stride,
                v_ptr + kv_head * v_head_stride, v_params_ptr + kv_head * v_params_head_stride, slopes_ptr,
                k_block_stride, v_block_stride, k_params_block_stride, v_params_block_stride, scale, softcap,
                tl.maximum(split * tokens, first_visible), tl.minimum((split + 1) * tokens, context_len),
                D, MAIN, DV, KP, VP, BLOCK_SIZE, TILE, ONE_BLOCK, ROWS, K_FORMAT, V_FORMAT, IS_LATENT, HAS_SOFTCAP,
                ALIBI, ASM,
            )  # fmt: skip
            heads = first_head + tl.arange(0, ROWS)
            live = first_of_group + tl.arange(0, ROWS) < GROUP
            d = tl.arange(0, VP)[None, :]
            mask = live[:, None] & (d < DV // V_PARTS)
            if V_FORMAT == "plain" and splits - first_split == 1:
                if HAS_SINKS:
                    sink = tl.load(sinks_ptr + heads, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
                    largest = tl.maximum(m, sink)
                    mass = mass * tl.exp2(m - largest) + tl.exp2(sink - largest)
                    acc = acc * tl.exp2(m - largest)[:, None]
                result = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
                target = out_ptr + (row.to(tl.int64) * HEADS + heads[:, None]) * DV + d
                tl.store(target, result.to(out_ptr.dtype.element_ty), mask=mask)
            else:
                part = slot.to(tl.int64) * HEADS + heads
                where = partials_ptr + part[:, None] * DV
                tl.store(where + element_of(d, 0, V_FORMAT, DV), acc, mask=mask)
                if V_PARTS > 1:
                    tl.store(where + element_of(d, 1, V_FORMAT, DV), acc_1, mask=mask)
                if V_PARTS > 2:
                    tl.store(where + element_of(d, 2, V_FORMAT, DV), acc_2, mask=mask)
                    tl.store(where + element_of(d, 3, V_FORMAT, DV), acc_3, mask=mask)
                tl.store(stats_ptr + part * 2, m, mask=live)
                tl.store(stats_ptr + part * 2 + 1, mass, mask=live)
                tl.debug_barrier()  # the counter speaks for all threads' stores
                counter = counters_ptr + row * HEADS + first_head
                done = tl.atomic_add(counter, 1, sem="acq_rel")
                if done == splits - first_split - 1:
                    _add_up(
                        partials_ptr, stats_ptr, sinks_ptr, out_ptr, slot - split, first_split, splits, row, first_head,
                        GROUP - first_of_group, HEADS, DV, REDUCE_ROWS, REDUCE_DIM, REDUCE_SPLITS, MAX_SPLITS,
                        V_PIECE, V_STAGES, HAS_SINKS,
                    )  # fmt: skip
                    tl.store(counter, 0)


@triton.jit
def _attend_split(
    q_ptr, table_ptr, first_head, live_rows, k_ptr, k_params_ptr, v_ptr, v_params_ptr, slopes_ptr,
    k_block_stride, v_block_stride, k_params_block_stride, v_params_block_stride, scale, softcap, first, end,
    D: tl.constexpr, MAIN: tl.constexpr, DV: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, ONE_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    K_FORMAT: tl.constexpr, V_FORMAT: tl.constexpr, IS_LATENT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Keys first .. end - 1: four parts of the weighted values [ROWS, VP], maximum and sum of the weights [ROWS]."""
    K_INTEGER: tl.constexpr = K_FORMAT == "int8" or K_FORMAT == "int4"
    V_INTEGER: tl.constexpr = V_FORMAT == "int8" or V_FORMAT == "int4"
    K_PARTS: tl.constexpr = 1 if K_FORMAT == "plain" else 4 if K_FORMAT == "int4" else 2
    V_PARTS: tl.constexpr = 1 if V_FORMAT == "plain" else 4 if V_FORMAT == "int4" else 2
    K_WIDTH: tl.constexpr = MAIN // K_PARTS
    V_WIDTH: tl.constexpr = DV // V_PARTS
    K_STRIDE: tl.constexpr = D // K_PARTS
    V_STRIDE: tl.constexpr = D if IS_LATENT else V_WIDTH
    K_DTYPE: tl.constexpr = k_ptr.dtype.element_ty if K_FORMAT == "plain" else q_ptr.dtype.element_ty
    V_DTYPE: tl.constexpr = v_ptr.dtype.element_ty if V_FORMAT == "plain" else q_ptr.dtype.element_ty
    r = tl.arange(0, ROWS)
    live = r < live_rows
    k_units, v_units = tl.arange(0, KP), tl.arange(0, VP)
    q_rows = q_ptr + (first_head + r)[:, None] * D
    q_mask = live[:, None] & (k_units < K_WIDTH)[None, :]
    q_0 = tl.load(q_rows + element_of(k_units, 0, K_FORMAT, D)[None, :], mask=q_mask, other=0.0)
    if K_PARTS > 1:
        q_1 = tl.load(q_rows + element_of(k_units, 1, K_FORMAT, D)[None, :], mask=q_mask, other=0.0)
        q_sum = tl.sum(q_0.to(tl.float32) + q_1.to(tl.float32), axis=1)
    if K_PARTS > 2:
        q_2 = tl.load(q_rows + element_of(k_units, 2, K_FORMAT, D)[None, :], mask=q_mask, other=0.0)
        q_3 = tl.load(q_rows + element_of(k_units, 3, K_FORMAT, D)[None, :], mask=q_mask, other=0.0)
        q_sum += tl.sum(q_2.to(tl.float32) + q_3.to(tl.float32), axis=1)
    q_0 = q_0.to(K_DTYPE)
    if D > MAIN:
        tail = MAIN + tl.arange(0, D - MAIN)
        q_tail = tl.load(q_rows + tail[None, :], mask=live[:, None], other=0.0).to(K_DTYPE)
    slopes = tl.load(slopes_ptr + first_head + r, mask=live, other=0.0) if ALIBI > 0 else tl.zeros((ROWS,), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    z = tl.zeros((ROWS,), tl.float32)
    acc_0 = tl.zeros((ROWS, VP), tl.float32)
    acc_1, acc_2, acc_3 = acc_0, acc_0, acc_0
    if ONE_BLOCK:
        next_block = tl.load(table_ptr + first // BLOCK_SIZE, mask=first < end, other=0)
    else:
        first_n = first // TILE * TILE + tl.arange(0, TILE)
        next_block = tl.load(table_ptr + first_n // BLOCK_SIZE, mask=(first_n >= first) & (first_n < end), other=0)
    for start in tl.range(first // TILE * TILE, end, TILE):
        n = start + tl.arange(0, TILE)
        visible = (n >= first) & (n < end)
        # Asked for one tile ahead: a load that waits for another would take up stages of the pipeline.
        block = next_block.to(tl.int64)
        if ONE_BLOCK:
            next_block = tl.load(table_ptr + (start + TILE) // BLOCK_SIZE, mask=start + TILE < end, other=0)
            offset = start % BLOCK_SIZE + tl.arange(0, TILE)
        else:
            next_block = tl.load(table_ptr + (n + TILE) // BLOCK_SIZE, mask=n + TILE < end, other=0)
            offset = n % BLOCK_SIZE
        # A score that is not visible is replaced, but 0 * NaN is NaN: hence rows of values that are not visible are 0.
        k_offset = block * k_block_stride + offset * K_STRIDE
        k = _load_rows(k_ptr, k_offset, visible, k_units, K_WIDTH, KP, IS_LATENT)
        if K_FORMAT == "plain":
            scores = tl.dot(q_0, tl.trans(k), input_precision="ieee")
        else:
            part = part_of(k, 0, K_FORMAT, K_DTYPE, ASM)
            scores = tl.dot(q_0, tl.trans(part), input_precision="ieee")
            part = part_of(k, 1, K_FORMAT, K_DTYPE, ASM)
            scores = tl.dot(q_1, tl.trans(part), scores, input_precision="ieee")
            if K_PARTS > 2:
                part = part_of(k, 2, K_FORMAT, K_DTYPE, ASM)
                scores = tl.dot(q_2, tl.trans(part), scores, input_precision="ieee")
                part = part_of(k, 3, K_FORMAT, K_DTYPE, ASM)
                scores = tl.dot(q_3, tl.trans(part), scores, input_precision="ieee")
            k_params = tl.load(k_params_ptr + block * k_params_block_stride + offset, mask=visible, other=0)
            scores = scores * (scale_of(k_params) * float8_factor(K_FORMAT))[None, :]
            if K_INTEGER:
                scores += q_sum[:, None] * minimum_of(k_params)[None, :]
        if D > MAIN:
            k_tail = tl.load(k_ptr + k_offset[:, None] + tail[None, :])
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
        scores = softcapped(scores, scale, softcap, HAS_SOFTCAP)
        if ALIBI > 0:
            scores = biased(scores, slopes, n, scale, ALIBI)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        m_next = tl.maximum(m, tl.max(scores, axis=1))
        shrink = tl.exp2(m - m_next)
        p = tl.exp2(scores - m_next[:, None])
        mass = mass * shrink + tl.sum(p, axis=1)
        m = m_next
        acc_0 = acc_0 * shrink[:, None]
        v_offset = block * v_block_stride + offset * V_STRIDE
        if IS_LATENT:
            acc_0 = tl.dot(p.to(V_DTYPE), k, acc_0, input_precision="ieee")
        elif V_FORMAT == "plain":
            v = _load_rows(v_ptr, v_offset, visible, v_units, V_WIDTH, VP, True)
            acc_0 = tl.dot(p.to(V_DTYPE), v, acc_0, input_precision="ieee")
        else:
            v = _load_rows(v_ptr, v_offset, visible, v_units, V_WIDTH, VP, V_FORMAT == "e5m2")
            v_params = tl.load(v_params_ptr + block * v_params_block_stride + offset, mask=visible, other=0)
            if V_INTEGER:
                z = z * shrink + tl.sum(p * minimum_of(v_params)[None, :], axis=1)
            p = (p * (scale_of(v_params) * float8_factor(V_FORMAT))[None, :]).to(V_DTYPE)
            acc_0 = tl.dot(p, part_of(v, 0, V_FORMAT, V_DTYPE, ASM), acc_0, input_precision="ieee")
            acc_1 = tl.dot(p, part_of(v, 1, V_FORMAT, V_DTYPE, ASM), acc_1 * shrink[:, None], input_precision="ieee")
            if V_PARTS > 2:
                part = part_of(v, 2, V_FORMAT, V_DTYPE, ASM)
                acc_2 = tl.dot(p, part, acc_2 * shrink[:, None], input_precision="ieee")
                part = part_of(v, 3, V_FORMAT, V_DTYPE, ASM)
                acc_3 = tl.dot(p, part, acc_3 * shrink[:, None], input_precision="ieee")
    z = z[:, None]
    return acc_0 + z, acc_1 + z, acc_2 + z, acc_3 + z, m, mass


@triton.jit
def _add_up(
    partials_ptr, stats_ptr, sinks_ptr, out_ptr, first_slot, first_split, splits, row, first_head, live_rows,
    HEADS: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, AT_ONCE: tl.constexpr,
    MAX_SPLITS: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """The output of one request's heads from those of its splits."""
    r = tl.arange(0, ROWS)
    live = r < live_rows
    d = tl.arange(0, DIM)
    all_splits = tl.arange(0, MAX_SPLITS)[:, None]
    there = (all_splits >= first_split) & (all_splits < splits) & live[None, :]
    parts = (first_slot + all_splits).to(tl.int64) * HEADS + first_head + r[None, :]
    maxima = tl.load(stats_ptr + parts * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(stats_ptr + parts * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
    largest = tl.max(maxima, axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + first_head + r, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
        largest = tl.maximum(largest, sink)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    whole = tl.sum(sums * tl.exp2(maxima - largest[None, :]), axis=0)
    if HAS_SINKS:
        whole += tl.exp2(sink - largest)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for start in tl.range(first_split, splits, AT_ONCE, num_stages=1):
        some = start + tl.arange(0, AT_ONCE)[:, None]
        part = (first_slot + some).to(tl.int64) * HEADS + first_head + r[None, :]
        mask = (some < splits) & live[None, :]
        maximum = tl.load(stats_ptr + part * 2, mask=mask, other=float("-inf"), cache_modifier=".cg")
        weight = tl.exp2(maximum - largest[None, :])
        pointers = partials_ptr + part[:, :, None] * DV + d[None, None, :]
        some_mask = mask[:, :, None] & (d < DV)[None, None, :]
        partial = tl.load(pointers, mask=some_mask, other=0.0, cache_modifier=".cg")
        acc += tl.sum(partial * weight[:, :, None], axis=0)
    acc = acc / tl.where(whole == 0.0, 1.0, whole)[:, None]
    if PIECE > 1:
        acc = hadamard(acc, PIECE, STAGES)
    target = out_ptr + (row.to(tl.int64) * HEADS + first_head + r[:, None]) * DV + d[None, :]
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & (d < DV)[None, :])
