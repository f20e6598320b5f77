"""Hopper's attention of prompts: it compiles everywhere, and on a GPU it is held against float32 and against itself."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.cuda import prefill_attention as cuda
from lmdeploy.kernels.cuda.prefill_attention import ARCH, Shape, Variant
from lmdeploy.kernels.reference import attention as reference
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.layers.context import ForwardContext
from tests.kernels.triton.steps import fill, make_spec, make_step, normal, poisoned_layer, widened

on_gpu = pytest.mark.skipif(not cuda.is_usable(), reason="there is no Hopper GPU")
VARIANTS = [
    Variant(128, 32, 8, 64, False, False, False, Shape(2, 5, 1)),
    Variant(128, 12, 2, 16, True, False, True, Shape(2, 5, 2)),
    Variant(96, 8, 8, 0, True, True, False, Shape(2, 5, 1)),
    Variant(64, 32, 8, 256, False, False, False, Shape(3, 8, 4)),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_compiles_and_fits(variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMDEPLOY_CACHE", str(tmp_path))
    try:
        assert nvrtc.cubin("prefill_attention.cu", variant.macros(), ARCH)
    except nvrtc.KernelError as error:
        if "NVRTC cannot be loaded" not in str(error):
            raise
        pytest.skip(f"no NVRTC: {error}")
    assert variant.shared_bytes() <= 227 << 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_divide_tiles_and_blocks(variant: Variant) -> None:
    assert cuda.KEYS % variant.box == 0
    assert variant.block_size % variant.box == 0
    assert cuda.KEYS // variant.box * -(-variant.dim // 64) <= 32  # a lane each


def test_what_it_does_not_know_is_refused() -> None:
    spec = make_spec(4, 2, 128)
    q, cache = torch.zeros(3, 4, 128, dtype=torch.float16), torch.zeros(5, 2, 64, 128, dtype=torch.float16)
    assert not cuda.supports(spec, q, cache, cache)  # on no GPU
    assert not cuda.supports(make_spec(4, 2, 80), q[..., :80], cache[..., :80], cache[..., :80])


def attend(
    q: Tensor, keys: Tensor, values: Tensor, ctx: ForwardContext, spec: AttentionSpec, rows: slice, shape: Shape | None
) -> Tensor:
    """Some requests of a step alone."""
    start, end = int(ctx.cu_seqlens_q[rows.start]), int(ctx.cu_seqlens_q[rows.stop])
    return cuda.prefill_attention(
        q[start:end],
        keys,
        values,
        None,
        (ctx.cu_seqlens_q[rows.start : rows.stop + 1] - start).contiguous(),
        ctx.block_tables[rows],
        ctx.context_lens[rows],
        max(ctx.query_lens[rows]),
        spec,
        dtype=q.dtype,
        shape=shape,
    )


FORMS = [  # query and key-value heads, size of a head, tokens of a block, type, window, shape
    (8, 2, 128, 64, torch.bfloat16, None, None),
    (12, 2, 128, 16, torch.float16, None, Shape(2, 5, 2)),
    (7, 1, 128, 64, torch.bfloat16, 77, None),
    (8, 2, 128, 64, torch.bfloat16, 1, Shape(2, 4, 4)),
    (3, 3, 96, 48, torch.bfloat16, None, None),
    (8, 1, 64, 256, torch.float16, None, None),
    (8, 2, 64, 32, torch.bfloat16, 400, Shape(2, 6, 4)),
]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("form", FORMS)
def test_ragged_prompts_over_blocks(form: tuple[int, int, int, int, torch.dtype, int | None, Shape | None]) -> None:
    heads, kv_heads, dim, size, dtype, window, shape = form
    draw, device = random.Random(heads * size), torch.device("cuda")
    spec = replace(make_spec(heads, kv_heads, dim), window=window)
    for number, (requests, longest) in enumerate([(1, 1500), (3, 400), (34, 150), (5, 3)]):
        query_lens = [draw.randrange(1, longest) for _ in range(requests)]
        context_lens = [n + draw.choice([0, 0, draw.randrange(900)]) for n in query_lens]
        ctx = make_step(query_lens, context_lens, sum(-(-n // size) for n in context_lens) + 2, size, device)
        keys, values = poisoned_layer(int(ctx.block_tables.max()) + 1, size, spec, device, dtype)
        fill(keys, values, ctx, spec)
        assert isinstance(keys, Tensor)
        assert isinstance(values, Tensor)
        q = normal(sum(query_lens), heads, dim, seed=number, device=device, dtype=dtype)
        assert cuda.supports(spec, q, keys, values)
        every = slice(0, requests)
        out = attend(q, keys, values, ctx, spec, every, shape)
        assert torch.equal(out, attend(q, keys, values, ctx, spec, every, shape))
        want = reference.paged_attention(q.float(), widened(keys), widened(values), ctx, spec)
        assert (out.float() - want).norm() / want.norm() < (1e-2 if dtype == torch.bfloat16 else 2e-3)
        row = draw.randrange(requests)  # whatever else is in the batch
        start = int(ctx.cu_seqlens_q[row])
        alone = attend(q, keys, values, ctx, spec, slice(row, row + 1), shape)
        assert torch.equal(alone, out[start : start + query_lens[row]])


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_runs(dim: int) -> None:
    """Keys and values one after the other instead of in blocks; the result in another type."""
    device, spec = torch.device("cuda"), make_spec(8, 2, dim)
    query_lens, context_lens = [300, 1, 64, 129], [300, 500, 900, 129]
    ctx = make_step(query_lens, context_lens, sum(-(-n // 64) for n in context_lens) + 2, 64, device)
    keys, values = poisoned_layer(int(ctx.block_tables.max()) + 1, 64, spec, device, torch.float16)
    fill(keys, values, ctx, spec)
    assert isinstance(keys, Tensor)
    assert isinstance(values, Tensor)
    rows = list(zip(ctx.block_tables, context_lens, strict=True))
    k, v = (torch.cat([x[row.long()].transpose(1, 2).flatten(0, 1)[:n] for row, n in rows]) for x in (keys, values))
    starts = torch.tensor([0, *context_lens], device=device).cumsum(0, dtype=torch.int32)
    q = normal(sum(query_lens), 8, dim, seed=1, device=device, dtype=torch.float16)
    assert cuda.supports(spec, q, k, v)
    requests = (ctx.cu_seqlens_q, ctx.block_tables, ctx.context_lens, max(query_lens))
    out = cuda.prefill_attention(q, k, v, starts, *requests, spec, dtype=torch.bfloat16)
    want = reference.paged_attention(q.float(), widened(keys), widened(values), ctx, spec)
    assert out.dtype == torch.bfloat16
    assert (out.float() - want).norm() / want.norm() < 1e-2
