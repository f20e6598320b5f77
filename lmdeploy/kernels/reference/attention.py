"""Rotary embedding, cache writes and blocked attention in plain PyTorch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmdeploy.kernels import invariant
from lmdeploy.kernels.reference.basic import rms_norm
from lmdeploy.kernels.spec import AttentionSpec

if TYPE_CHECKING:
    from lmdeploy.kernels.reference.quantized_cache import QuantizedBlocks
    from lmdeploy.layers.context import ForwardContext

    Blocks = Tensor | QuantizedBlocks


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first R dimensions of each head. x: [T, H, D]; cos, sin: [T, R/2] float32.

    Pairs are (j, j + R/2), or (2j, 2j + 1) when interleaved. https://arxiv.org/abs/2104.09864
    """
    rotary_dim = 2 * cos.shape[-1]
    rotated, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = rotated.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def store_kv(k: Tensor, v: Tensor, keys: Blocks, values: Blocks, slot_mapping: Tensor) -> None:
    """Write k, v: [T, Hkv, D] into the blocks keys, values: [NB, Hkv, S, D] at slot = block * S + offset."""
    for x, cache in ((k, keys), (v, values)):
        if isinstance(cache, Tensor):
            _write(x, cache, slot_mapping)
        else:
            for part, target in zip(cache.encode(x), cache.parts, strict=True):
                _write(part, target, slot_mapping)


def _write(x: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    block_size = cache.shape[2]
    cache[slot_mapping // block_size, :, slot_mapping % block_size] = x.to(cache.dtype)


def rope_store_attend(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Blocks,
    values: Blocks,
    ctx: ForwardContext,
    spec: AttentionSpec,
) -> Tensor:
    """Per-head norms, rotation, cache write and attention of one layer: [T, (H + 2 Hkv) * D] -> [T, H * D]."""
    q, k, v = _split_heads(qkv, spec)
    if cos is not None and sin is not None:
        q = apply_rope(q, cos, sin, spec.interleaved)
        k = apply_rope(k, cos, sin, spec.interleaved)
    store_kv(k, v, keys, values, ctx.slot_mapping)
    return paged_attention(_grow(q, ctx, spec), keys, values, ctx, spec).flatten(1)


def store_rotate_attend(
    qkv: Tensor, frequencies: Tensor, keys: Blocks, values: Blocks, ctx: ForwardContext, spec: AttentionSpec
) -> Tensor:
    """rope_store_attend for a cache of unrotated keys, each query turning all its keys with its own frequencies.

    frequencies: [T, R / 2] float32. For models whose rotation of old keys changes as the context grows.
    """
    q, k, v = _split_heads(qkv, spec)
    store_kv(k, v, keys, values, ctx.slot_mapping)
    angles = ctx.positions.float()[:, None] * frequencies
    q = _grow(apply_rope(q, angles.cos(), angles.sin(), spec.interleaved), ctx, spec)
    if ctx.is_decode and not invariant.applies(len(q)):
        k, v = (_read(cache, ctx.block_tables, max(ctx.context_lens_host)) for cache in (keys, values))
        k = _rotate_keys(k, frequencies, spec)
        return _attend(q[:, None], k, v, ctx.positions[:, None], spec)[:, 0].flatten(1)
    out = q.new_empty(*q.shape[:2], spec.value_dim)
    for row, start, end in ctx.once("equal_frequencies", lambda: _equal_runs(frequencies, ctx)):
        context_len = ctx.context_lens_host[row]
        k, v = (_read(cache, ctx.block_tables[row : row + 1], context_len) for cache in (keys, values))
        k = _rotate_keys(k, frequencies[start : start + 1], spec)
        out[start:end] = _attend(q[None, start:end], k, v, ctx.positions[None, start:end], spec)[0]
    return out.flatten(1)


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
    """Attention over the compressed cache of multi-head latent attention, all heads sharing one key and value.

    q: [T, H, latent + R], already projected into the latent space; latent: [T, latent]; rope_key: [T, R];
    cache: [NB, 1, S, latent + R]. Returns [T, H, latent], still to be projected. https://arxiv.org/abs/2405.04434
    """
    size = latent.shape[-1]
    q = torch.cat((q[..., :size], apply_rope(q[..., size:], cos, sin, spec.interleaved)), dim=-1)
    turned = apply_rope(rope_key[:, None], cos, sin, spec.interleaved)
    entry = torch.cat((latent[:, None], turned), dim=-1)
    block_size = cache.shape[2]
    cache[ctx.slot_mapping // block_size, :, ctx.slot_mapping % block_size] = entry.to(cache.dtype)
    return paged_attention(q, cache, cache[..., :size], ctx, spec)


def _split_heads(qkv: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """[T, (H + 2 Hkv) * D] -> q [T, H, D], k and v [T, Hkv, D], clipped and normalized."""
    if spec.clip is not None:
        qkv = qkv.clamp(-spec.clip, spec.clip)
    counts = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    q, k, v = qkv.view(qkv.shape[0], -1, spec.head_dim).split(counts, dim=1)
    if spec.q_norm is not None and spec.k_norm is not None:
        q = rms_norm(q, spec.q_norm, spec.qk_norm_eps, spec.qk_norm_offset)
        k = rms_norm(k, spec.k_norm, spec.qk_norm_eps, spec.qk_norm_offset)
    return q, k, v


def _grow(q: Tensor, ctx: ForwardContext, spec: AttentionSpec) -> Tensor:
    """Queries beyond logn_length, longer by log_length(position). https://arxiv.org/abs/2202.12172"""
    if spec.logn_length is None:
        return q
    growth = torch.log((ctx.positions + 1).float()) / math.log(spec.logn_length)
    return (q * growth.clamp(min=1)[:, None, None]).to(q.dtype)


def _rotate_keys(k: Tensor, frequencies: Tensor, spec: AttentionSpec) -> Tensor:
    """Turn keys [B, Hkv, c, D] of positions 0 .. c-1 with frequencies [B, R / 2] of each request."""
    batch, _, count, _ = k.shape
    positions = torch.arange(count, device=k.device, dtype=torch.float32)
    angles = (positions[:, None] * frequencies[:, None]).flatten(0, 1)
    rows = k.transpose(1, 2).flatten(0, 1)
    return apply_rope(rows, angles.cos(), angles.sin(), spec.interleaved).unflatten(0, (batch, count)).transpose(1, 2)


def _equal_runs(frequencies: Tensor, ctx: ForwardContext) -> list[tuple[int, int, int]]:
    """Runs of consecutive tokens of one request with the same frequencies, as (request, first token, end)."""
    differs = (frequencies[1:] != frequencies[:-1]).any(dim=-1).tolist()
    runs = []
    start = 0
    for row, count in enumerate(ctx.query_lens):
        last = start + count
        for token in range(start + 1, last + 1):
            if token == last or differs[token - 1]:
                runs.append((row, start, token))
                start = token
    return runs


def paged_attention(q: Tensor, keys: Blocks, values: Blocks, ctx: ForwardContext, spec: AttentionSpec) -> Tensor:
    """Causal attention of each request's new tokens over its blocks.

    q: [T, H, D]; keys, values: [NB, Hkv, S, D]; ctx.block_tables: [B, max_blocks] int32, padded with 0.
    Returns [T, H, Dv] in q's dtype; softmax in float32. Reads the K/V that store_kv wrote in this step.
    Source: PagedAttention, https://arxiv.org/abs/2309.06180
    """
    if isinstance(keys, Tensor) or isinstance(values, Tensor):
        return _attend_blocks(q, keys, values, ctx, spec)
    # Queries go to the keys' stored basis, and the weighted sum of values comes back from theirs: no key or value has to.
    return values.rotate(_attend_blocks(keys.rotate(q), keys, values, ctx, spec)).to(q.dtype)


def _attend_blocks(q: Tensor, keys: Blocks, values: Blocks, ctx: ForwardContext, spec: AttentionSpec) -> Tensor:
    if ctx.is_decode and not invariant.applies(len(q)):
        k, v = (_gather(cache, ctx.block_tables, max(ctx.context_lens_host)) for cache in (keys, values))
        return _attend(q[:, None], k, v, ctx.positions[:, None], spec)[:, 0]
    out = q.new_empty(*q.shape[:2], spec.value_dim)
    start = 0
    for row, (query_len, context_len) in enumerate(zip(ctx.query_lens, ctx.context_lens_host, strict=True)):
        end = start + query_len
        k, v = (_gather(cache, ctx.block_tables[row : row + 1], context_len) for cache in (keys, values))
        positions = torch.arange(context_len - query_len, context_len, device=q.device)
        out[start:end] = _attend(q[None, start:end], k, v, positions[None], spec)[0]
        start = end
    return out


def _gather(cache: Blocks, block_tables: Tensor, length: int) -> Tensor:
    """The first `length` cached tokens of each request: [NB, Hkv, S, D], [B, max_blocks] -> [B, Hkv, length, D].

    Quantized ones come in float32 and in the basis in which they are stored.
    """
    if not isinstance(cache, Tensor):
        return cache.decode(*(_gather(part, block_tables, length) for part in cache.parts))
    num_blocks = -(-length // cache.shape[2])
    blocks = cache[block_tables[:, :num_blocks].long()]
    return blocks.transpose(1, 2).flatten(2, 3)[:, :, :length]


def _read(cache: Blocks, block_tables: Tensor, length: int) -> Tensor:
    """_gather, in the basis of the model."""
    gathered = _gather(cache, block_tables, length)
    return gathered if isinstance(cache, Tensor) else cache.rotate(gathered)


def _attend(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, spec: AttentionSpec) -> Tensor:
    """q: [B, n, H, D] at positions [B, n]; k, v: [B, Hkv, c, D] at 0 .. c-1. Returns [B, n, H, Dv]."""
    batch, count, heads, dim = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    if k.device.type == "cpu":  # in 16 bits oneDNN would compile the products of every length: invariant.padded_rows
        k, v = k.float(), v.float()
    grouped = q.view(batch, count, kv_heads, group, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    scores = (grouped.to(k.dtype) @ k.transpose(-1, -2)).float().view(batch, kv_heads, group, count, -1) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    key_positions = torch.arange(k.shape[2], device=q.device)
    if spec.alibi_slopes is not None:
        scores = scores + _alibi(key_positions, spec).view(1, kv_heads, group, 1, -1)
    hidden = key_positions > positions[..., None]
    if spec.window is not None:
        hidden |= key_positions <= positions[..., None] - spec.window
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    probabilities = _softmax(scores, spec.sinks)
    v = v.masked_fill(hidden.all(dim=1)[:, None, :, None], 0.0)  # what nobody wrote may be NaN, and 0 * NaN is NaN
    out = probabilities.to(v.dtype).view(batch, kv_heads, group * count, -1) @ v
    out = out.view(batch, kv_heads, group, count, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, count, heads, -1).to(q.dtype)


def _alibi(key_positions: Tensor, spec: AttentionSpec) -> Tensor:
    """The bias of each head on keys at the given positions, [H, c] float32. https://arxiv.org/abs/2108.12409"""
    assert spec.alibi_slopes is not None
    if spec.alibi_unscaled:
        return (spec.alibi_slopes.bfloat16()[:, None] * key_positions).float() * spec.scale
    return spec.alibi_slopes[:, None] * key_positions


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension; a sink is one more logit per head whose share is dropped."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    sink = sinks.float().view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
