"""rope_store_attend of the CPU kernels against its definition in float64, request by request and head by head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels import cpu
from lmdeploy.kernels.reference import basic
from lmdeploy.kernels.reference.attention import apply_rope
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.layers.context import ForwardContext, KVCache
from tests.kernels.cpu_targets import TARGETS, running


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.manual_seed(0)
    with running(request.param):
        yield request.param


@dataclass
class Case:
    """A step: (new tokens, cached tokens) per request, the heads, and what else the spec says."""

    requests: tuple[tuple[int, int], ...]
    heads: tuple[int, int, int] = (4, 2, 32)  # query heads, KV heads, head dimension
    block_size: int = 16
    rotary_dim: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def spec(self) -> AttentionSpec:
        heads, kv_heads, dim = self.heads
        return AttentionSpec(heads, kv_heads, dim, dim, dim**-0.5, **self.options)


def make_context(case: Case, cache: KVCache) -> ForwardContext:
    """Blocks are dealt out at random, so that neighbours in a context are not neighbours in memory."""
    queries, totals = [q for q, _ in case.requests], [q + past for q, past in case.requests]
    size = case.block_size
    counts = [-(-total // size) for total in totals]
    free = torch.randperm(cache.data.shape[0]).tolist()
    table = torch.zeros(len(queries), max(counts), dtype=torch.int32)
    positions, slots = [], []
    for row, (count, new, total) in enumerate(zip(counts, queries, totals, strict=True)):
        table[row, :count] = torch.tensor([free.pop() for _ in range(count)])
        at = torch.arange(total - new, total)
        positions.append(at)
        slots.append(table[row].long()[at // size] * size + at % size)
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    lens = torch.tensor(totals, dtype=torch.int32)
    return ForwardContext(torch.cat(positions), starts, lens, table, torch.cat(slots), lens, cache, queries, totals)


def expected_result(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    ctx: ForwardContext,
    spec: AttentionSpec,
) -> Tensor:
    """The definition, in float64. Writes K and V rounded to the cache's type."""
    q, k, v = qkv.view(len(qkv), -1, spec.head_dim).split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
    if spec.q_norm is not None and spec.k_norm is not None:
        q = basic.rms_norm(q.double(), spec.q_norm, spec.qk_norm_eps, spec.qk_norm_offset)
        k = basic.rms_norm(k.double(), spec.k_norm, spec.qk_norm_eps, spec.qk_norm_offset)
    if cos is not None and sin is not None:
        q, k = (apply_rope(t.double(), cos, sin, spec.interleaved) for t in (q, k))
    size, out, group = keys.shape[2], [], spec.num_heads // spec.num_kv_heads
    for token, slot in enumerate(ctx.slot_mapping.tolist()):
        keys[slot // size, :, slot % size] = k[token].to(keys.dtype)
        values[slot // size, :, slot % size] = v[token].to(values.dtype)
    for row, (new, total) in enumerate(zip(ctx.query_lens, ctx.context_lens_host, strict=True)):
        where = torch.arange(total)
        blocks, offsets = ctx.block_tables[row].long()[where // size], where % size
        cached_k, cached_v = (cache[blocks, :, offsets].double() for cache in (keys, values))
        for token in range(new):
            position = total - new + token
            first = 0 if spec.window is None else max(0, position - spec.window + 1)
            query = q[int(ctx.cu_seqlens_q[row]) + token].double()
            for head in range(spec.num_heads):
                seen_k, seen_v = (c[first : position + 1, head // group] for c in (cached_k, cached_v))
                scores = seen_k @ query[head] * spec.scale
                if spec.softcap is not None:
                    scores = spec.softcap * torch.tanh(scores / spec.softcap)
                if spec.alibi_slopes is not None:
                    scores = scores + spec.alibi_slopes[head] * torch.arange(first, position + 1)
                if spec.sinks is not None:
                    scores = torch.cat((scores, spec.sinks[head : head + 1].double()))
                out.append(torch.softmax(scores, dim=0)[: len(seen_k)] @ seen_v)
    return torch.stack(out).view(len(qkv), -1)


def check(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """The result within `tolerance`, relative; the cache written as by the definition and nowhere else."""
    spec = case.spec()
    heads, kv_heads, dim = case.heads
    blocks = sum(-(-(q + past) // case.block_size) for q, past in case.requests) + 2
    data = torch.randn(blocks, 3, 2, kv_heads, case.block_size, dim).to(dtype)
    ctx = make_context(case, KVCache(data))
    tokens = sum(q for q, _ in case.requests)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype)
    cos = sin = None
    if case.rotary_dim != 0:
        angles = torch.randn(tokens, (case.rotary_dim or dim) // 2)
        cos, sin = angles.cos(), angles.sin()
    wanted = data.clone()
    expected = expected_result(qkv, cos, sin, *KVCache(wanted).layer(1), ctx, spec)
    actual = cpu.rope_store_attend(qkv, cos, sin, *ctx.kv_cache.layer(1), ctx, spec)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < tolerance
    torch.testing.assert_close(data, wanted, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-5)
    assert torch.equal(data[:, [0, 2]], wanted[:, [0, 2]])


CASES = {
    "decode": Case(((1, 0), (1, 15), (1, 16), (1, 40))),
    "long decode": Case(((1, 255), (1, 256), (1, 700), (1, 3)), heads=(6, 2, 64), block_size=64),
    "prefill": Case(((64, 0),), heads=(9, 3, 64), block_size=64),
    "odd prefill": Case(((37, 0), (2, 0), (3, 130)), heads=(5, 5, 48)),
    "mixed": Case(((1, 20), (19, 0), (1, 0), (7, 33), (1, 300)), heads=(8, 2, 32)),
    "long prefill": Case(((150, 170),), heads=(3, 1, 64), block_size=64),
    "one KV head": Case(((1, 50), (40, 10)), heads=(14, 1, 64)),
    "many heads": Case(((5, 9), (1, 9)), heads=(100, 1, 16)),
    "wide heads": Case(((20, 5), (1, 30)), heads=(4, 2, 256)),
    "dim 128": Case(((20, 5), (1, 30)), heads=(4, 2, 128)),
    "dim 80": Case(((20, 5), (1, 30)), heads=(2, 2, 80)),
    "window": Case(((1, 300), (40, 300), (1, 3), (9, 0)), options={"window": 24}),
    "softcap": Case(((1, 300), (30, 20)), options={"softcap": 0.5}),
    "no rotation": Case(((1, 30), (30, 20)), rotary_dim=0),
    "partial rotation": Case(((1, 30), (30, 20)), heads=(4, 2, 64), rotary_dim=24),
    "interleaved": Case(((1, 30), (30, 20)), rotary_dim=16, options={"interleaved": True}),
    "sinks": Case(((1, 300), (30, 20)), options={"sinks": torch.tensor([0.5, -1.0, 3.0, 20.0])}),
    "alibi": Case(((1, 300), (30, 20)), rotary_dim=0, options={"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01])}),
    "head norms": Case(
        ((1, 30), (30, 20)),
        options={"q_norm": torch.linspace(0.5, 1, 32), "k_norm": torch.linspace(1, 2, 32).bfloat16(), "qk_norm_eps": 1e-3,
                 "qk_norm_offset": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_attention_in_float32(target: str, name: str) -> None:
    check(CASES[name], torch.float32, tolerance=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_attention_in_bfloat16(target: str, name: str) -> None:
    check(CASES[name], torch.bfloat16, tolerance=3e-2)


def test_a_request_does_not_depend_on_its_batch(target: str) -> None:
    spec = AttentionSpec(4, 2, 32, 32, 32**-0.5)
    case = Case(((1, 600), (1, 20), (30, 10)))
    data = torch.randn(60, 1, 2, 2, 16, 32).bfloat16()
    ctx = make_context(case, KVCache(data))
    qkv = torch.randn(32, 8 * 32).bfloat16()
    together = cpu.rope_store_attend(qkv, None, None, *ctx.kv_cache.layer(0), ctx, spec)
    for row, (start, end) in enumerate(((0, 1), (1, 2), (2, 32))):
        rows = slice(row, row + 1)
        alone = ForwardContext(
            ctx.positions[start:end], torch.tensor([0, end - start], dtype=torch.int32), ctx.context_lens[rows],
            ctx.block_tables[rows], ctx.slot_mapping[start:end], ctx.prompt_lens[rows], ctx.kv_cache,
            ctx.query_lens[rows], ctx.context_lens_host[rows],
        )  # fmt: skip
        result = cpu.rope_store_attend(qkv[start:end], None, None, *ctx.kv_cache.layer(0), alone, spec)
        assert torch.equal(result, together[start:end])


def test_a_negative_slot_is_not_written(target: str) -> None:
    data = torch.randn(2, 1, 2, 2, 16, 32)
    ctx = make_context(Case(((1, 4),)), KVCache(data))
    ctx.slot_mapping = torch.tensor([-1])
    before = data.clone()
    out = cpu.rope_store_attend(torch.randn(1, 8 * 32), None, None, *ctx.kv_cache.layer(0), ctx, Case(()).spec())
    assert torch.equal(data, before)
    assert torch.isfinite(out).all()


def test_what_the_kernel_does_not_compute_is_said() -> None:
    def supports(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> bool:
        numbers = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "value_dim": 64, "scale": 0.125, **changes}
        return cpu.supports(AttentionSpec(**numbers), dtype)

    assert supports()
    assert supports(torch.float32, window=3, softcap=1.0)
    assert not supports(torch.float16)
    assert not supports(head_dim=40, value_dim=40)
    assert not supports(value_dim=32)
    assert not supports(clip=8.0)
    assert not supports(logn_length=2048)


def test_a_cache_that_does_not_fit_is_refused(target: str) -> None:
    ctx = make_context(Case(((1, 4),)), KVCache(torch.zeros(2, 1, 2, 2, 16, 32)))
    keys, values = ctx.kv_cache.layer(0)
    with pytest.raises(ValueError, match="does not fit"):
        cpu.rope_store_attend(torch.zeros(1, 100), None, None, keys, values, ctx, Case(()).spec())
    with pytest.raises(ValueError, match="does not fit"):
        cpu.rope_store_attend(torch.zeros(1, 8 * 32), None, None, keys, values.contiguous(), ctx, Case(()).spec())
