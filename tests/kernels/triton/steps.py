"""Caches full of poison and steps of ragged requests, for the kernels and for their twins alike."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from lmdeploy.kernels.reference.attention import store_kv
from lmdeploy.kernels.reference.quantized_cache import QuantizedBlocks
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.kernels.triton.stored import Blocks
from lmdeploy.layers.context import ForwardContext, KVCache
from lmdeploy.layers.quantized_cache import FORMATS, QuantizedKVCache
from lmdeploy.messages import QuantPolicy


def normal(*shape: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def make_spec(heads: int, kv_heads: int, dim: int, value_dim: int | None = None) -> AttentionSpec:
    return AttentionSpec(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, value_dim=value_dim or dim, scale=dim**-0.5
    )


def poisoned_layer(
    num_blocks: int,
    block_size: int,
    spec: AttentionSpec,
    device: torch.device,
    dtype: torch.dtype = torch.float16,
    policy: QuantPolicy | None = None,
) -> tuple[Blocks, Blocks]:
    """Keys and values [NB, Hkv, S, D], the second of two layers, where nobody has written but NaN."""
    shape = (num_blocks, 2, 2, spec.num_kv_heads, block_size, spec.head_dim)
    if policy is None:
        return KVCache(torch.full(shape, float("nan"), device=device, dtype=dtype)).layer(1)
    cache = QuantizedKVCache(
        shape,
        FORMATS[policy],
        lambda part, kind: torch.full(part, 255 if kind == torch.uint8 else float("nan"), device=device, dtype=kind),
    )
    return cache.layer(1)


def make_step(
    query_lens: list[int], context_lens: list[int], num_blocks: int, block_size: int, device: torch.device
) -> ForwardContext:
    """Requests on blocks in random order; tables are padded with 0 and block 0 belongs to nobody.

    A context of 0 tokens is a row of padding.
    """
    free = list(range(1, num_blocks))
    random.Random(0).shuffle(free)
    tables = [[free.pop() for _ in range(-(-length // block_size))] for length in context_lens]
    width = max(len(table) for table in tables) + 1
    positions = [p for n, c in zip(query_lens, context_lens, strict=True) for p in range(c - n, c)]
    rows = [row for row, n in enumerate(query_lens) for _ in range(n)]
    slots = [
        tables[row][p // block_size] * block_size + p % block_size if p >= 0 else -1
        for row, p in zip(rows, positions, strict=True)
    ]
    return ForwardContext(
        positions=torch.tensor(positions, device=device),
        cu_seqlens_q=torch.tensor([0, *query_lens], device=device).cumsum(0).int(),
        context_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        block_tables=torch.tensor(
            [table + [0] * (width - len(table)) for table in tables], dtype=torch.int32, device=device
        ),
        slot_mapping=torch.tensor(slots, device=device),
        prompt_lens=torch.tensor(context_lens, dtype=torch.int32, device=device),
        kv_cache=KVCache(torch.empty(0)),
        query_lens=query_lens,
        context_lens_host=context_lens,
    )


def fill(keys: Blocks, values: Blocks, ctx: ForwardContext, spec: AttentionSpec, seed: int = 0) -> None:
    """Random K and V for all tokens that the requests have in the cache after the step."""
    block_size = (keys if isinstance(keys, Tensor) else keys.codes).shape[2]
    tables = ctx.block_tables.long()
    for row, length in enumerate(ctx.context_lens_host):
        if not length:
            continue
        p = torch.arange(length, device=tables.device)
        slots = tables[row, p // block_size] * block_size + p % block_size
        k, v = (
            normal(length, spec.num_kv_heads, spec.head_dim, seed=seed + 2 * row + i, device=tables.device)
            for i in (0, 1)
        )
        store_kv(k + 0.3, v - 0.2, keys, values, slots)


def widened(blocks: Blocks) -> Blocks:
    """The same numbers in float32, for a twin that computes in float32."""
    return blocks.float() if isinstance(blocks, Tensor) else blocks


def clones(blocks: Blocks) -> Blocks:
    if isinstance(blocks, Tensor):
        return blocks.clone()
    return QuantizedBlocks(blocks.codes.clone(), blocks.params.clone(), blocks.format)
