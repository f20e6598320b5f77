"""Attention over quantized blocks against its definition in float64 on what the blocks hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmdeploy import kernels
from lmdeploy.kernels.reference import attention
from lmdeploy.kernels.reference.quantized_cache import QuantizedBlocks
from lmdeploy.layers.quantized_cache import FORMATS, QuantizedKVCache
from lmdeploy.messages import QuantPolicy
from tests.kernels.test_quantized_cache import hadamard_matrix
from tests.layers.test_attention import (
    BLOCK_SIZE,
    DIM,
    HEADS,
    KV_HEADS,
    LENGTHS,
    NUM_BLOCKS,
    PLAIN,
    SPECS,
    STEPS,
    context,
    heads_of,
    random,
    rotate,
    rotated_query,
    weighted_values,
)

TABLES = [[9, 2, 0, 0], [4, 11, 1, 7], [5, 0, 0, 0]]
FREQUENCIES = torch.tensor([1.0, 0.3, 0.05])  # 6 of 8 dimensions
# Largest error, relative to 1 + the vector's largest number.
STORED_WITHIN = {None: 0.02, torch.float8_e4m3fn: 0.07, torch.float8_e5m2: 0.13}
STORED_WITHIN_4_BITS = 0.35


def make_cache(policy: QuantPolicy) -> QuantizedKVCache:
    """Full of codes and params that nobody wrote."""
    shape = (NUM_BLOCKS, 2, 2, KV_HEADS, BLOCK_SIZE, DIM)
    return QuantizedKVCache(shape, FORMATS[policy], lambda part, dtype: torch.full(part, 3, dtype=dtype))


def stored(blocks: QuantizedBlocks, table: list[int], count: int) -> Tensor:
    """What the blocks hold of a request's first tokens, [count, Hkv, D] float64, computed by hand from the bytes."""
    slots = [(table[p // BLOCK_SIZE], p % BLOCK_SIZE) for p in range(count)]
    codes = torch.stack([blocks.codes[block, :, offset] for block, offset in slots])
    scale, minimum = torch.stack([blocks.params[block, :, offset] for block, offset in slots]).double().unbind(-1)
    if blocks.format.float_type is not None:
        numbers = codes.view(blocks.format.float_type).double()
    elif blocks.format.bits == 4:
        numbers = torch.cat((codes % 16, codes // 16), dim=-1).double()
    else:
        numbers = codes.double()
    x = numbers * scale[..., None] + minimum[..., None]
    return x @ hadamard_matrix(DIM) if blocks.format.is_rotated else x


def run_steps(policy: QuantPolicy, name: str, steps: tuple[tuple[tuple[int, int], ...], ...]) -> list[Tensor]:
    """Attention of all requests, [n, H * D] each, in the given steps, each checked against the definition."""
    spec = SPECS[name]
    qkv = [random(n, (HEADS + 2 * KV_HEADS) * DIM, seed=n) for n in LENGTHS]
    cache = make_cache(policy)
    keys, values = cache.layer(1)
    outputs: list[list[Tensor]] = [[] for _ in LENGTHS]
    for step in steps:
        spans = list(step)
        ctx = context(spans, TABLES, list(LENGTHS), cache)
        rows = torch.cat([x[start:end] for x, (start, end) in zip(qkv, spans, strict=True)])
        angles = ctx.positions.float()[:, None] * FREQUENCIES
        out = kernels.rope_store_attend(rows, angles.cos(), angles.sin(), keys, values, ctx, spec)
        parts = out.split([end - start for start, end in spans])
        for request, (start, end) in enumerate(spans):
            outputs[request].append(parts[request])
            k, v = (stored(blocks, TABLES[request], end) for blocks in (keys, values))
            for i in range(start, end):
                q = rotated_query(qkv[request][i], i, spec, FREQUENCIES)
                expected = weighted_values(q, k[: i + 1], v[: i + 1], spec)
                torch.testing.assert_close(parts[request][i - start].double(), expected, rtol=1e-4, atol=1e-5)
                _, new_key, new_value = heads_of(qkv[request][i], spec)
                turned = torch.stack([rotate(head, i, FREQUENCIES, spec.interleaved) for head in new_key])
                for got, wanted, blocks in ((k[i], turned, keys), (v[i], new_value, values)):
                    format = blocks.format
                    within = STORED_WITHIN_4_BITS if format.bits == 4 else STORED_WITHIN[format.float_type]
                    assert (got - wanted).abs().max() < within * (1 + wanted.abs().max())
    assert all(not part.codes.ne(3).any() for part in cache.layer(0)), "another layer's blocks were written"
    return [torch.cat(parts) for parts in outputs]


@pytest.mark.parametrize("policy", FORMATS)
@pytest.mark.parametrize("name", SPECS)
def test_variants(name: str, policy: QuantPolicy) -> None:
    chunked = run_steps(policy, name, STEPS)
    whole = run_steps(policy, name, (tuple((0, length) for length in LENGTHS),))
    for a, b in zip(chunked, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", FORMATS)
def test_keys_that_are_rotated_when_read(policy: QuantPolicy) -> None:
    """Tokens beyond length 8 turn more slowly the longer the context is, and so do all keys that they see."""
    qkv = [random(n, (HEADS + 2 * KV_HEADS) * DIM, seed=n) for n in LENGTHS]
    cache = make_cache(policy)
    keys, values = cache.layer(0)

    def frequencies(position: int) -> Tensor:
        return torch.tensor([1.0, 0.3, 0.05, 0.01]) * 8 / max(8, position + 1)

    for step in STEPS:
        spans = list(step)
        ctx = context(spans, TABLES, list(LENGTHS), cache)
        rows = torch.cat([x[start:end] for x, (start, end) in zip(qkv, spans, strict=True)])
        table = torch.stack([frequencies(int(p)) for p in ctx.positions])
        out = iter(attention.store_rotate_attend(rows, table, keys, values, ctx, PLAIN))
        for request, (start, end) in enumerate(spans):
            k, v = (stored(blocks, TABLES[request], end) for blocks in (keys, values))
            for i in range(start, end):
                turned = [[rotate(head, j, frequencies(i), False) for head in k[j]] for j in range(i + 1)]
                q = rotated_query(qkv[request][i], i, PLAIN, frequencies(i))
                expected = weighted_values(q, torch.stack([torch.stack(t) for t in turned]), v[: i + 1], PLAIN)
                torch.testing.assert_close(next(out).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_come_back_in_their_type(policy: QuantPolicy, dtype: torch.dtype) -> None:
    qkv = random(5, (HEADS + 2 * KV_HEADS) * DIM, seed=1).to(dtype)
    outputs = []
    for x in (qkv, qkv.float()):
        cache = make_cache(policy)
        ctx = context([(0, 5)], TABLES[:1], [5], cache)
        outputs.append(kernels.rope_store_attend(x, None, None, *cache.layer(0), ctx, PLAIN))
    assert outputs[0].dtype == dtype
    torch.testing.assert_close(outputs[0].float(), outputs[1], rtol=1e-2, atol=1e-2)


def test_a_block_of_all_layers_is_one_piece() -> None:
    cache = make_cache(QuantPolicy.K8V4)
    assert cache.block_size == BLOCK_SIZE
    assert cache.data.is_contiguous()
    assert cache.params.is_contiguous()
    keys, values = cache.layer(1)
    assert keys.codes[2, 1].is_contiguous()
    assert (keys.codes.shape[-1], values.codes.shape[-1]) == (DIM, DIM // 2)
    keys.codes.zero_(), values.codes.zero_()
    assert not cache.data[:, 1].any()
    assert cache.data[:, 0].eq(3).all()
