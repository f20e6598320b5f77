"""Hopper's attention of prompts: it compiles everywhere, and on a GPU it is held against float32 and against itself."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.cuda import prefill_attention as cuda
from lmdeploy.kernels.cuda.prefill_attention import ARCH, Variant
from lmdeploy.kernels.reference import attention as reference
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.layers.context import ForwardContext
from tests.kernels.triton.steps import fill, make_spec, make_step, normal, poisoned_layer, widened

on_gpu = pytest.mark.skipif(not cuda.is_usable(), reason="there is no Hopper GPU")
VARIANTS = [
    Variant(128, 32, 8, 64, is_half=False),
    Variant(128, 12, 2, 16, is_half=True),
    Variant(64, 32, 8, 256, is_half=False),
]


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_compiles_and_fits(variant: Variant) -> None:
    assert nvrtc.cubin("prefill_attention.cu", variant.macros(), ARCH)
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


def attend(q: Tensor, keys: Tensor, values: Tensor, ctx: ForwardContext, spec: AttentionSpec, rows: slice) -> Tensor:
    """Some requests of a step alone."""
    start, end = int(ctx.cu_seqlens_q[rows.start]), int(ctx.cu_seqlens_q[rows.stop])
    return cuda.prefill_attention(
        q[start:end],
        keys,
        values,
        (ctx.cu_seqlens_q[rows.start : rows.stop + 1] - start).contiguous(),
        ctx.block_tables[rows],
        ctx.context_lens[rows],
        max(ctx.query_lens[rows]),
        spec,
    )


FORMS = [  # query and key-value heads, size of a head, tokens of a block, type
    (8, 2, 128, 64, torch.bfloat16),
    (12, 2, 128, 16, torch.float16),
    (7, 1, 128, 64, torch.bfloat16),
    (3, 3, 128, 48, torch.bfloat16),
    (8, 1, 64, 256, torch.float16),
    (8, 2, 64, 32, torch.bfloat16),
]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("form", FORMS)
def test_ragged_prompts_over_blocks(form: tuple[int, int, int, int, torch.dtype]) -> None:
    heads, kv_heads, dim, size, dtype = form
    draw, device = random.Random(heads * size), torch.device("cuda")
    spec = make_spec(heads, kv_heads, dim)
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
        out = attend(q, keys, values, ctx, spec, every)
        assert torch.equal(out, attend(q, keys, values, ctx, spec, every))
        want = reference.paged_attention(q.float(), widened(keys), widened(values), ctx, spec)
        assert (out.float() - want).norm() / want.norm() < (1e-2 if dtype == torch.bfloat16 else 2e-3)
        row = draw.randrange(requests)  # whatever else is in the batch
        start = int(ctx.cu_seqlens_q[row])
        alone = attend(q, keys, values, ctx, spec, slice(row, row + 1))
        assert torch.equal(alone, out[start : start + query_lens[row]])
