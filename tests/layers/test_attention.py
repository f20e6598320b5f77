"""Every attention variant over the blocked cache against its definition, written out query by query in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels.reference import attention
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.layers.alibi import alibi_slopes
from lmdeploy.layers.context import ForwardContext, KVCache

HEADS, KV_HEADS, DIM, BLOCK_SIZE, NUM_BLOCKS = 4, 2, 8, 4, 16
LENGTHS = (7, 13, 1)
# Which tokens of each request a step computes: chunks of mixed sizes beside decodes, then decodes alone.
STEPS = (((0, 3), (0, 10), (0, 1)), ((3, 6), (10, 12), (1, 1)), ((6, 7), (12, 13), (1, 1)))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PLAIN = AttentionSpec(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, value_dim=DIM, scale=0.4)
SPECS = {
    "plain": PLAIN,
    "interleaved": replace(PLAIN, interleaved=True),
    "window": replace(PLAIN, window=3),
    "softcap": replace(PLAIN, softcap=1.5),
    "alibi": replace(PLAIN, alibi_slopes=alibi_slopes(HEADS)),
    "alibi unscaled": replace(PLAIN, alibi_slopes=alibi_slopes(HEADS), alibi_unscaled=True),
    "sinks": replace(PLAIN, sinks=random(HEADS, seed=5), window=4),
    "norms": replace(
        PLAIN, q_norm=random(DIM, seed=6), k_norm=random(DIM, seed=7), qk_norm_eps=1e-5, qk_norm_offset=1.0
    ),
    "clip": replace(PLAIN, clip=0.7),
    "logn": replace(PLAIN, logn_length=5),
}


def context(
    spans: list[tuple[int, int]], tables: list[list[int]], prompt_lens: list[int], cache: KVCache
) -> ForwardContext:
    """A step that computes tokens start .. end - 1 of each request; empty spans take no part."""
    rows = [row for row, (start, end) in enumerate(spans) if end > start]
    tokens = [(row, position) for row in rows for position in range(*spans[row])]
    counts = [spans[row][1] - spans[row][0] for row in rows]
    lengths = [spans[row][1] for row in rows]
    slots = [tables[row][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for row, p in tokens]
    return ForwardContext(
        positions=torch.tensor([position for _, position in tokens]),
        cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).int(),
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=torch.tensor([tables[row] for row in rows], dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
        prompt_lens=torch.tensor([prompt_lens[row] for row in rows], dtype=torch.int32),
        kv_cache=cache,
        query_lens=counts,
        context_lens_host=lengths,
    )


def rotate(x: Tensor, position: int, frequencies: Tensor, interleaved: bool) -> Tensor:
    """One head [D] turned pair by pair."""
    out = x.clone()
    count = len(frequencies)
    for j, frequency in enumerate(frequencies.tolist()):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + count)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[a], out[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
    return out


def heads_of(row: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    row = row.double() if spec.clip is None else row.double().clamp(-spec.clip, spec.clip)
    q, k, v = row.view(-1, DIM).split((HEADS, KV_HEADS, KV_HEADS))
    if spec.q_norm is not None and spec.k_norm is not None:
        q, k = (
            x / (x.square().mean(-1, keepdim=True) + spec.qk_norm_eps).sqrt() * (weight.double() + spec.qk_norm_offset)
            for x, weight in ((q, spec.q_norm), (k, spec.k_norm))
        )
    return q, k, v


def expected_row(qkv: Tensor, i: int, spec: AttentionSpec, frequencies: Tensor) -> Tensor:
    """Output [H * D] of the query at position i of one request; qkv: [n, (H + 2 Hkv) * D]."""
    parts = [heads_of(row, spec) for row in qkv[: i + 1]]
    q = rotated_query(qkv[i], i, spec, frequencies)
    keys = [[rotate(k, j, frequencies, spec.interleaved) for k in part[1]] for j, part in enumerate(parts)]
    return weighted_values(q, torch.stack([torch.stack(k) for k in keys]), torch.stack([p[2] for p in parts]), spec)


def rotated_query(row: Tensor, i: int, spec: AttentionSpec, frequencies: Tensor) -> Tensor:
    """[H, D] of the token at position i; row: [(H + 2 Hkv) * D]."""
    grow = max(1.0, math.log(i + 1) / math.log(spec.logn_length)) if spec.logn_length else 1.0
    return torch.stack([rotate(q, i, frequencies, spec.interleaved) * grow for q in heads_of(row, spec)[0]])


def weighted_values(q: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec) -> Tensor:
    """Output [H * D] of the query [H, D] at the last position; keys, values: [n, Hkv, D], all in float64."""
    i = len(keys) - 1
    first = 0 if spec.window is None else max(0, i - spec.window + 1)
    outputs = []
    for head in range(HEADS):
        kv_head = head * KV_HEADS // HEADS
        scores = []
        for j in range(first, i + 1):
            score = float(q[head] @ keys[j][kv_head]) * spec.scale
            if spec.softcap is not None:
                score = spec.softcap * math.tanh(score / spec.softcap)
            if spec.alibi_slopes is not None and spec.alibi_unscaled:
                score += float(spec.alibi_slopes[head].bfloat16() * j) * spec.scale
            elif spec.alibi_slopes is not None:
                score += float(spec.alibi_slopes[head]) * j
            scores.append(score)
        if spec.sinks is not None:
            scores.append(float(spec.sinks[head]))
        shares = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)[: i + 1 - first]
        outputs.append(shares @ values[first:, kv_head])
    return torch.cat(outputs)


@pytest.mark.parametrize("name", SPECS)
def test_variants(name: str) -> None:
    spec = SPECS[name]
    qkv = [random(n, (HEADS + 2 * KV_HEADS) * DIM, seed=n) for n in LENGTHS]
    tables = [[9, 2, 0, 0], [4, 11, 1, 7], [5, 0, 0, 0]]
    cache = KVCache(torch.full((NUM_BLOCKS, 1, 2, KV_HEADS, BLOCK_SIZE, DIM), 3.0))
    keys, values = cache.layer(0)
    frequencies = torch.tensor([1.0, 0.3, 0.05])  # 6 of 8 dimensions
    for step in STEPS:
        spans = [(start, end) for start, end in step]
        ctx = context(spans, tables, list(LENGTHS), cache)
        rows = torch.cat([x[start:end] for x, (start, end) in zip(qkv, spans, strict=True)])
        angles = ctx.positions.float()[:, None] * frequencies
        out = attention.rope_store_attend(rows, angles.cos(), angles.sin(), keys, values, ctx, spec)
        queries = [(x, i) for x, (start, end) in zip(qkv, spans, strict=True) for i in range(start, end)]
        expected = torch.stack([expected_row(x, i, spec, frequencies) for x, i in queries])
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_unrotated_keys_turn_with_the_querys_frequencies() -> None:
    """Tokens beyond length 8 turn more slowly the longer the context is, and so do all keys that they see."""
    qkv = [random(n, (HEADS + 2 * KV_HEADS) * DIM, seed=n) for n in LENGTHS]
    tables = [[9, 2, 0, 0], [4, 11, 1, 7], [5, 0, 0, 0]]
    cache = KVCache(torch.zeros(NUM_BLOCKS, 1, 2, KV_HEADS, BLOCK_SIZE, DIM))
    keys, values = cache.layer(0)

    def frequencies(position: int) -> Tensor:
        return torch.tensor([1.0, 0.3, 0.05, 0.01]) * 8 / max(8, position + 1)

    for step in STEPS:
        spans = [(start, end) for start, end in step]
        ctx = context(spans, tables, list(LENGTHS), cache)
        rows = torch.cat([x[start:end] for x, (start, end) in zip(qkv, spans, strict=True)])
        table = torch.stack([frequencies(int(p)) for p in ctx.positions])
        out = attention.store_rotate_attend(rows, table, keys, values, ctx, PLAIN)
        queries = [(x, i) for x, (start, end) in zip(qkv, spans, strict=True) for i in range(start, end)]
        expected = torch.stack([expected_row(x, i, PLAIN, frequencies(i)) for x, i in queries])
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    stored = qkv[0].view(LENGTHS[0], -1, DIM)[:BLOCK_SIZE, HEADS : HEADS + KV_HEADS]
    torch.testing.assert_close(keys[9], stored.transpose(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("num_heads", "slopes"),
    [
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (5, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (1, [2**-8]),
    ],
)
def test_alibi_slopes(num_heads: int, slopes: list[float]) -> None:
    torch.testing.assert_close(alibi_slopes(num_heads), torch.tensor(slopes))


def test_alibi_slopes_of_forty_heads() -> None:
    slopes = alibi_slopes(40).tolist()
    assert slopes[:3] == pytest.approx([2 ** (-0.25 * n) for n in (1, 2, 3)])
    assert slopes[32:35] == pytest.approx([2 ** (-0.125 * n) for n in (1, 3, 5)])
    assert len(set(slopes)) == 40
