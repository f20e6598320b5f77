"""Decode and prefill attention against the plain function in float32, over caches where unused places hold NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels.reference import attention
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.kernels.triton import decode_attention as decode
from lmdeploy.kernels.triton.prefill_attention import prefill_attention
from lmdeploy.kernels.triton.stored import Blocks, attention_dtype
from lmdeploy.layers.alibi import alibi_slopes
from lmdeploy.layers.context import ForwardContext
from lmdeploy.layers.quantized_cache import FORMATS
from lmdeploy.messages import QuantPolicy
from tests.kernels.triton.numbers import DTYPES
from tests.kernels.triton.steps import fill, make_spec, make_step, normal, poisoned_layer, widened

BLOCK_SIZE, NUM_BLOCKS = 64, 16
LENGTHS = [130, 1, 64, 0, 259]  # across splits, one token, a full block, padding, three splits
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PLAIN = make_spec(4, 2, 64)
SINKS = normal(4, seed=3, device=torch.device("cpu"))
VARIANTS = {
    "plain": PLAIN,
    "window": replace(PLAIN, window=50),
    "window within a split": replace(PLAIN, window=3),
    "softcap": replace(PLAIN, softcap=1.5),
    "alibi": replace(PLAIN, alibi_slopes=alibi_slopes(4)),
    "alibi unscaled": replace(PLAIN, alibi_slopes=alibi_slopes(4), alibi_unscaled=True),
    "sinks": replace(PLAIN, sinks=SINKS, window=70),
    "sinks alone": replace(PLAIN, sinks=SINKS),
}


def moved(spec: AttentionSpec, device: torch.device) -> AttentionSpec:
    parts = {name: getattr(spec, name) for name in ("sinks", "alibi_slopes")}
    return replace(spec, **{name: part.to(device) for name, part in parts.items() if part is not None})


def expected(q: Tensor, keys: Blocks, values: Blocks, ctx: ForwardContext, spec: AttentionSpec) -> Tensor:
    """[T, H, Dv] float32; rows of padding are 0."""
    rows = [row for row, length in enumerate(ctx.context_lens_host) if length]
    real = replace(
        ctx,
        positions=ctx.context_lens[rows].long() - 1 if ctx.is_decode else ctx.positions,
        context_lens=ctx.context_lens[rows],
        block_tables=ctx.block_tables[rows],
        query_lens=[ctx.query_lens[row] for row in rows],
        context_lens_host=[ctx.context_lens_host[row] for row in rows],
    )
    if not ctx.is_decode:
        return attention.paged_attention(q, widened(keys), widened(values), ctx, spec).float()
    out = torch.zeros(*q.shape[:2], spec.value_dim, device=q.device)
    out[rows] = attention.paged_attention(q[rows].float(), widened(keys), widened(values), real, spec)
    return out


def stored_query(q: Tensor, keys: Blocks) -> Tensor:
    """As rope_store returns it."""
    return q if isinstance(keys, Tensor) else keys.rotate(q).to(attention_dtype(keys, q.dtype))


def run_decode(
    q: Tensor,
    keys: Blocks,
    values: Blocks,
    ctx: ForwardContext,
    spec: AttentionSpec,
    scratch: decode.Scratch | None = None,
) -> Tensor:
    scratch = scratch or decode.make_scratch(len(q) + 1, 5000, q.shape[1], spec.value_dim, q.device)
    scratch.partials.fill_(float("nan"))
    work = decode.plan(ctx.context_lens, scratch)
    out = decode.decode_attention(stored_query(q, keys), keys, values, ctx.block_tables, work, spec, dtype=q.dtype)
    assert scratch.counters.count_nonzero() == 0
    return out


def decode_step(
    spec: AttentionSpec,
    device: torch.device,
    lengths: list[int] = LENGTHS,
    dtype: torch.dtype = torch.float16,
    policy: QuantPolicy | None = None,
    block_size: int = BLOCK_SIZE,
) -> tuple[Tensor, Blocks, Blocks, ForwardContext]:
    num_blocks = sum(-(-n // block_size) for n in lengths) + 2
    ctx = make_step([1] * len(lengths), lengths, num_blocks, block_size, device)
    keys, values = poisoned_layer(num_blocks, block_size, spec, device, dtype, policy)
    fill(keys, values, ctx, spec)
    return normal(len(lengths), spec.num_heads, spec.head_dim, seed=9, device=device, dtype=dtype), keys, values, ctx


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_decode_variants(name: str, dtype: torch.dtype, device: torch.device) -> None:
    spec = moved(VARIANTS[name], device)
    q, keys, values, ctx = decode_step(spec, device, dtype=dtype)
    out = run_decode(q, keys, values, ctx, spec)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.float(), expected(q, keys, values, ctx, spec), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(2, 2, 80, 64), (3, 1, 96, 16), (6, 1, 192, 32), (20, 1, 64, 256), (2, 1, 256, 128), (8, 2, 128, 48)],
)
def test_decode_shapes(heads: int, kv_heads: int, dim: int, block_size: int, device: torch.device) -> None:
    spec = make_spec(heads, kv_heads, dim)
    q, keys, values, ctx = decode_step(spec, device, [300, 0, 17], block_size=block_size)
    out = run_decode(q, keys, values, ctx, spec)
    torch.testing.assert_close(out.float(), expected(q, keys, values, ctx, spec), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("policy", FORMATS)
def test_decode_from_quantized_blocks(policy: QuantPolicy, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    spec = make_spec(4, 2, dim)
    q, keys, values, ctx = decode_step(spec, device, [130, 0, 5], dtype, policy)
    out = run_decode(q, keys, values, ctx, spec)
    tolerance = 4e-3 if dtype == torch.float16 else 3e-5
    torch.testing.assert_close(out.float(), expected(q, keys, values, ctx, spec), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["window", "softcap", "sinks", "alibi"])
def test_decode_variants_of_quantized_blocks(name: str, device: torch.device) -> None:
    spec = moved(VARIANTS[name], device)
    q, keys, values, ctx = decode_step(spec, device, [130, 0, 5], policy=QuantPolicy.INT4)
    out = run_decode(q, keys, values, ctx, spec)
    torch.testing.assert_close(out.float(), expected(q, keys, values, ctx, spec), rtol=4e-3, atol=4e-3)


def test_decode_latent(device: torch.device) -> None:
    """All heads share one vector per token, the first part of which is the value too."""
    spec = make_spec(20, 1, 48, value_dim=32)
    lengths = [300, 1, 0]
    ctx = make_step([1] * 3, lengths, 10, 64, device)
    keys, _ = poisoned_layer(10, 64, spec, device)
    assert isinstance(keys, Tensor)
    fill(keys, keys.clone(), ctx, spec)
    q = normal(3, 20, 48, seed=1, device=device, dtype=torch.float16)
    out = run_decode(q, keys, keys[..., :32], ctx, spec)
    torch.testing.assert_close(out.float(), expected(q, keys, keys[..., :32], ctx, spec), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("policy", [None, QuantPolicy.INT4])
def test_a_row_alone_equals_the_row_in_a_batch(policy: QuantPolicy | None, device: torch.device) -> None:
    """Bit for bit, with a scratch of another size and another list of splits."""
    q, keys, values, ctx = decode_step(PLAIN, device, [130, 70, 259, 128, 1], policy=policy)
    together = run_decode(q, keys, values, ctx, PLAIN)
    for row, length in enumerate(ctx.context_lens_host):
        alone = replace(
            ctx,
            positions=ctx.positions[row : row + 1],
            context_lens=ctx.context_lens[row : row + 1],
            block_tables=ctx.block_tables[row : row + 1],
            query_lens=[1],
            context_lens_host=[length],
        )
        scratch = decode.make_scratch(1, 512, 4, 64, device)
        assert torch.equal(run_decode(q[row : row + 1], keys, values, alone, PLAIN, scratch)[0], together[row])


def test_plan_lists_every_split_once(device: torch.device) -> None:
    lengths = [0, 1, 128, 129, 4096, 4097, 100_000]
    scratch = decode.make_scratch(len(lengths), 100_000, 2, 64, device)
    decode.plan(torch.tensor(lengths, dtype=torch.int32, device=device), scratch)
    found = scratch.entries[: int(scratch.total)].tolist()
    per_split = [128, 128, 128, 128, 128, 256, 4096]
    splits = [max(1, -(-n // size)) for n, size in zip(lengths, per_split, strict=True)]
    assert found == [
        [row, split, per_split[row], lengths[row]] for row, count in enumerate(splits) for split in range(count)
    ]


QUERY_LENS, CONTEXT_LENS = [5, 1, 40, 33], [70, 130, 40, 34]


def run_prefill(
    q: Tensor, keys: Blocks, values: Blocks, ctx: ForwardContext, spec: AttentionSpec, may_use_torch: bool = True
) -> Tensor:
    return prefill_attention(
        stored_query(q, keys),
        keys,
        values,
        ctx.cu_seqlens_q,
        ctx.block_tables,
        ctx.context_lens,
        max(ctx.query_lens),
        max(ctx.context_lens_host),
        sum(ctx.context_lens_host),
        spec,
        dtype=q.dtype,
        may_use_torch=may_use_torch,
    )


def prefill_step(
    spec: AttentionSpec,
    device: torch.device,
    dtype: torch.dtype = torch.float16,
    policy: QuantPolicy | None = None,
    block_size: int = 64,
) -> tuple[Tensor, Blocks, Blocks, ForwardContext]:
    num_blocks = sum(-(-n // block_size) for n in CONTEXT_LENS) + 2
    ctx = make_step(QUERY_LENS, CONTEXT_LENS, num_blocks, block_size, device)
    keys, values = poisoned_layer(num_blocks, block_size, spec, device, dtype, policy)
    fill(keys, values, ctx, spec)
    return normal(sum(QUERY_LENS), spec.num_heads, spec.head_dim, seed=9, device=device, dtype=dtype), keys, values, ctx


@pytest.mark.parametrize("may_use_torch", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_variants(name: str, dtype: torch.dtype, may_use_torch: bool, device: torch.device) -> None:
    spec = moved(VARIANTS[name], device)
    q, keys, values, ctx = prefill_step(spec, device, dtype)
    out = run_prefill(q, keys, values, ctx, spec, may_use_torch)
    tolerance = TOLERANCE[dtype]
    want = expected(q.float(), keys, values, ctx, spec)
    torch.testing.assert_close(out.float(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"), [(2, 2, 80, 64), (3, 1, 96, 16), (2, 1, 192, 32), (4, 2, 128, 256)]
)
def test_prefill_shapes(heads: int, kv_heads: int, dim: int, block_size: int, device: torch.device) -> None:
    spec = make_spec(heads, kv_heads, dim)
    q, keys, values, ctx = prefill_step(spec, device, block_size=block_size)
    out = run_prefill(q, keys, values, ctx, spec)
    torch.testing.assert_close(out.float(), expected(q.float(), keys, values, ctx, spec), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("policy", FORMATS)
def test_prefill_from_quantized_blocks(policy: QuantPolicy, dim: int, device: torch.device) -> None:
    spec = make_spec(4, 2, dim)
    q, keys, values, ctx = prefill_step(spec, device, policy=policy)
    out = run_prefill(q, keys, values, ctx, spec)
    torch.testing.assert_close(out.float(), expected(q.float(), keys, values, ctx, spec), rtol=4e-3, atol=4e-3)


def test_prefill_latent(device: torch.device) -> None:
    spec = make_spec(3, 1, 48, value_dim=32)
    q, keys, _, ctx = prefill_step(spec, device)
    assert isinstance(keys, Tensor)
    out = run_prefill(q, keys, keys[..., :32], ctx, spec)
    want = expected(q.float(), keys, keys[..., :32], ctx, spec)
    torch.testing.assert_close(out.float(), want, rtol=2e-3, atol=2e-3)
