"""Attention of a whole step: its queries rotated and its keys stored, then requests of one token and of many, each its way.

It owns the buffers that decode steps share. It knows no module and no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmdeploy.kernels.cuda import decode_attention as cuda
from lmdeploy.kernels.reference.attention import apply_rope
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.kernels.triton import decode_attention as decode
from lmdeploy.kernels.triton.latent import store_entries
from lmdeploy.kernels.triton.prefill_attention import prefill_attention, running_sum
from lmdeploy.kernels.triton.rope_store import rope_store

if TYPE_CHECKING:
    from lmdeploy.kernels.reference.attention import Blocks
    from lmdeploy.layers.context import ForwardContext

_GATHERED_BYTES = 1 << 29  # of keys and values that prompts' attention copies at once, a single request's apart


class DecodeBuffers:
    """Scratch of decode attention for steps of up to max_batch requests, one set for each form of attention."""

    def __init__(self, max_batch: int, max_context_len: int, device: torch.device) -> None:
        self._max_batch, self._max_context_len = max_batch, max_context_len
        self._device = device
        self._scratch: dict[tuple[int, ...], decode.Scratch] = {}

    def scratch(
        self, num_heads: int, value_dim: int, min_split: int, whole: int, most: int | None = None
    ) -> decode.Scratch:
        """most: requests at most, if they are fewer than in the largest step."""
        batch = min(self._max_batch, most or self._max_batch)
        key = (num_heads, value_dim, min_split, whole, batch)
        if key not in self._scratch:
            self._scratch[key] = decode.make_scratch(
                batch, self._max_context_len, num_heads, value_dim, self._device, min_split=min_split, whole=whole
            )
        return self._scratch[key]


def rope_store_attend(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Blocks,
    values: Blocks,
    ctx: ForwardContext,
    spec: AttentionSpec,
) -> Tensor:
    """As the reference: [T, (H + 2 Hkv) * D] -> [T, H * D]."""
    count = ctx.num_decodes
    rotary_dim = 0 if cos is None else 2 * cos.shape[-1]
    if not count or not cuda.supports(spec, keys, values, qkv.dtype, rotary_dim):
        q = rope_store(qkv, cos, sin, ctx.positions, ctx.slot_mapping, keys, values, spec)
        return attend(q, keys, values, ctx, spec, qkv.dtype).flatten(1)
    done = _whole_decode_rows(qkv[:count], *_rows(cos, sin, slice(count)), keys, values, ctx, spec)
    if count == len(ctx.query_lens):
        return done
    rest = slice(count, None)
    q = rope_store(qkv[rest], *_rows(cos, sin, rest), ctx.positions[rest], ctx.slot_mapping[rest], keys, values, spec)
    prompts = _prompts(q, keys, values, ctx, spec, qkv.dtype)
    return torch.cat([done, *(part.flatten(1) for part in prompts)])


def _rows(cos: Tensor | None, sin: Tensor | None, rows: slice) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if cos is None or sin is None else (cos[rows], sin[rows])


def _whole_decode_rows(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Blocks,
    values: Blocks,
    ctx: ForwardContext,
    spec: AttentionSpec,
) -> Tensor:
    """The first len(qkv) requests of the step in one kernel, one token each."""
    shape = cuda.choose_shape(keys, spec, len(qkv))
    most = cuda.FEW_ITEMS // spec.num_kv_heads if shape.cluster > 1 else None
    work = _work(len(qkv), shape.min_split, shape.whole, most, ctx, spec)
    # What the kernel reads ahead of the kernel before it has come to be in this step, or before it.
    key = ("decode attention was launched", id(work), None if cos is None else cos.data_ptr())
    may_overlap = key in ctx.cache
    ctx.cache[key] = True
    tables = ctx.block_tables[: len(qkv)]
    return cuda.rope_store_attend(qkv, cos, sin, keys, values, tables, work, spec, may_overlap=may_overlap)


def latent_store_attend(
    q: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    ctx: ForwardContext,
    spec: AttentionSpec,
) -> Tensor:
    """As the reference: [T, H, latent + R] -> [T, H, latent]."""
    size = latent.shape[1]
    q = torch.cat((q[..., :size], apply_rope(q[..., size:], cos, sin, spec.interleaved)), dim=-1)
    turned = apply_rope(rope_key[:, None], cos, sin, spec.interleaved)[:, 0]
    store_entries(latent, turned, cache, ctx.slot_mapping)
    return attend(q, cache, cache[..., :size], ctx, spec, latent.dtype)


def attend(
    q: Tensor, keys: Blocks, values: Blocks, ctx: ForwardContext, spec: AttentionSpec, dtype: torch.dtype
) -> Tensor:
    """New tokens over what is stored: q [T, H, D] -> [T, H, Dv] in dtype."""
    num_decodes = ctx.num_decodes
    if num_decodes == len(ctx.query_lens):
        return decode_rows(q, keys, values, ctx, spec, dtype)
    parts = _prompts(q[num_decodes:], keys, values, ctx, spec, dtype)
    if num_decodes:
        parts.insert(0, decode_rows(q[:num_decodes], keys, values, ctx, spec, dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _prompts(
    q: Tensor, keys: Blocks, values: Blocks, ctx: ForwardContext, spec: AttentionSpec, dtype: torch.dtype
) -> list[Tensor]:
    """The requests behind those of one token, whose tokens q [.., H, D] holds, in parts."""
    token_bytes = spec.num_kv_heads * (spec.head_dim + spec.value_dim) * q.element_size()
    runs = _prefill_runs(ctx.context_lens_host, ctx.num_decodes, _GATHERED_BYTES // token_bytes)
    return [_prefill_rows(q, keys, values, ctx, spec, dtype, run) for run in runs]


def _prefill_runs(context_lens: list[int], first: int, limit: int) -> list[slice]:
    """The requests from `first` on, cut where the tokens of their contexts would exceed the limit: many may share a long
    prefix, which each of them gathers."""
    runs, start, total = [], first, 0
    for row in range(first, len(context_lens)):
        if row > start and total + context_lens[row] > limit:
            runs.append(slice(start, row))
            start, total = row, 0
        total += context_lens[row]
    return [*runs, slice(start, len(context_lens))]


def _prefill_rows(
    q: Tensor, keys: Blocks, values: Blocks, ctx: ForwardContext, spec: AttentionSpec, dtype: torch.dtype, rows: slice
) -> Tensor:
    """Some requests of a step, any number of tokens each; q has those behind the requests of one token."""
    start = sum(ctx.query_lens[: rows.start])
    first = start - ctx.num_decodes
    query_lens, context_lens = ctx.query_lens[rows], ctx.context_lens_host[rows]
    name = (rows.start, rows.stop)
    return prefill_attention(
        q[first : first + sum(query_lens)],
        keys,
        values,
        ctx.once(("prefill starts", name), lambda: ctx.cu_seqlens_q[rows.start : rows.stop + 1] - start),
        ctx.block_tables[rows],
        ctx.context_lens[rows],
        max(query_lens),
        max(context_lens),
        sum(context_lens),
        spec,
        cu_seqlens_k=ctx.once(("prefill ends", name), lambda: running_sum(ctx.context_lens[rows])),
        dtype=dtype,
    )


def decode_rows(
    q: Tensor, keys: Blocks, values: Blocks, ctx: ForwardContext, spec: AttentionSpec, dtype: torch.dtype
) -> Tensor:
    """The first len(q) requests of the step, one token each: q [B, H, D] -> [B, H, Dv]."""
    work = _work(len(q), decode.MIN_SPLIT, decode.WHOLE, None, ctx, spec)
    return decode.decode_attention(q, keys, values, ctx.block_tables[: len(q)], work, spec, dtype=dtype)


def _work(
    count: int, min_split: int, whole: int, most: int | None, ctx: ForwardContext, spec: AttentionSpec
) -> decode.Work:
    """The splits of the first `count` requests, listed once per step."""
    buffers = ctx.decode_buffers
    assert isinstance(buffers, DecodeBuffers)
    scratch = buffers.scratch(spec.num_heads, spec.value_dim, min_split, whole, most)
    work: decode.Work = ctx.once(("decode work", id(scratch)), lambda: decode.plan(ctx.context_lens[:count], scratch))
    return work
