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
        self._sizes = (max_batch, max_context_len)
        self._device = device
        self._scratch: dict[tuple[int, int, int], decode.Scratch] = {}

    def scratch(self, num_heads: int, value_dim: int, min_split: int, whole: int) -> decode.Scratch:
        key = (num_heads, value_dim, min_split)
        if key not in self._scratch:
            self._scratch[key] = decode.make_scratch(
                *self._sizes, num_heads, value_dim, self._device, min_split=min_split, whole=whole
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
    q = rope_store(qkv, cos, sin, ctx.positions, ctx.slot_mapping, keys, values, spec, table_by_token=True)
    return attend(q, keys, values, ctx, spec, qkv.dtype).flatten(1)


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
    token_bytes = spec.num_kv_heads * (spec.head_dim + spec.value_dim) * q.element_size()
    runs = _prefill_runs(ctx.context_lens_host, num_decodes, _GATHERED_BYTES // token_bytes)
    parts = [_prefill_rows(q, keys, values, ctx, spec, dtype, run) for run in runs]
    if num_decodes:
        parts.insert(0, decode_rows(q[:num_decodes], keys, values, ctx, spec, dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
    """Some requests of a step, any number of tokens each."""
    start = sum(ctx.query_lens[: rows.start])
    query_lens, context_lens = ctx.query_lens[rows], ctx.context_lens_host[rows]
    name = (rows.start, rows.stop)
    return prefill_attention(
        q[start : start + sum(query_lens)],
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
    buffers = ctx.decode_buffers
    assert isinstance(buffers, DecodeBuffers)
    kernels = cuda if cuda.supports(spec, keys, values) else decode
    scratch = buffers.scratch(spec.num_heads, spec.value_dim, kernels.MIN_SPLIT, kernels.WHOLE)
    work = ctx.once(("decode work", id(scratch)), lambda: decode.plan(ctx.context_lens[: len(q)], scratch))
    return kernels.decode_attention(q, keys, values, ctx.block_tables[: len(q)], work, spec, dtype=dtype)
