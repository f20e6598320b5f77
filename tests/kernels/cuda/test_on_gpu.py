"""The CUDA kernels on a GPU, against float64 and against the twins."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels.reference import attention as reference
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.layers.context import ForwardContext, KVCache
from lmdeploy.layers.quantized_cache import FORMATS, QuantizedKVCache
from lmdeploy.messages import QuantPolicy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
PADDING_BLOCKS = 2


@pytest.mark.parametrize("number", range(60))
def test_skinny_gemm(number: int) -> None:
    from benchmarks.skinny_gemm import check

    assert check(number) < 1e-2


def make_cache(num_blocks: int, heads: int, size: int, dim: int, policy: QuantPolicy, dtype: torch.dtype) -> KVCache:
    """A cache of two layers whose every element is poison."""
    shape = (num_blocks, 2, 2, heads, size, dim)
    if policy == QuantPolicy.NONE:
        return KVCache(torch.full(shape, float("nan"), dtype=dtype, device="cuda"))
    cache = QuantizedKVCache(shape, FORMATS[policy], lambda part, kind: torch.zeros(part, dtype=kind, device="cuda"))
    cache.params.fill_(float("nan"))
    return cache


@pytest.mark.parametrize("number", range(40))
def test_decode_attention(number: int) -> None:
    from lmdeploy.kernels.cuda import decode_attention as cuda
    from lmdeploy.kernels.triton import decode_attention as plan

    draw = random.Random(number)
    torch.manual_seed(number)
    policy = draw.choice([QuantPolicy.NONE, QuantPolicy.NONE, QuantPolicy.INT8, QuantPolicy.INT4, QuantPolicy.K8V4])
    dim = draw.choice([64, 80, 96, 128] if policy == QuantPolicy.NONE else [64, 128])
    kv_heads, group = draw.choice([1, 2, 8]), draw.choice([1, 4, 6, 7, 8, 16])
    dtype, size = draw.choice([torch.bfloat16, torch.float16]), draw.choice([16, 64, 128])
    lengths = [draw.randrange(1, draw.choice([70, 1500, 9000])) for _ in range(draw.choice([1, 3, 17]))] + [0]
    counts = [-(-length // size) for length in lengths]
    cache = make_cache(sum(counts) + PADDING_BLOCKS, kv_heads, size, dim, policy, dtype)
    keys, values = cache.layer(1)
    tables, first = torch.zeros(len(lengths), max(counts), dtype=torch.int32, device="cuda"), 0
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tables[row, :count] = torch.arange(first, first + count)
        slots = torch.arange(first * size, first * size + length, device="cuda")
        k, v = torch.randn(2, length, kv_heads, dim, device="cuda").to(dtype)
        reference.store_kv(k, v, keys, values, slots)
        first += count
    spec = AttentionSpec(kv_heads * group, kv_heads, dim, dim, dim**-0.5)
    q = torch.randn(len(lengths), spec.num_heads, dim, device="cuda").to(dtype)
    turned = q if isinstance(keys, Tensor) else keys.rotate(q.float()).half()
    context_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    assert cuda.supports(spec, keys, values)
    scratch = plan.make_scratch(
        len(lengths), 16384, spec.num_heads, dim, q.device, min_split=cuda.MIN_SPLIT, whole=cuda.WHOLE
    )

    def attend(rows: slice) -> Tensor:
        work = plan.plan(context_lens[rows].contiguous(), scratch)
        return cuda.decode_attention(turned[rows], keys, values, tables[rows], work, spec, dtype=dtype)

    out = attend(slice(None))
    assert torch.equal(out, attend(slice(None)))
    assert not scratch.counters.any()
    assert not out[-1].any()  # the padding row
    assert torch.equal(attend(slice(0, 1)), out[:1])  # whatever else is in the batch
    wide = (keys.float(), values.float()) if isinstance(keys, Tensor) and isinstance(values, Tensor) else (keys, values)
    for row, length in enumerate(lengths[:-1]):
        last = torch.tensor([length - 1], device="cuda")
        ones = context_lens[row : row + 1]
        ctx = ForwardContext(last, ones, ones, tables[row : row + 1], last, ones, cache, [1], [length])
        expected = reference.paged_attention(q[row : row + 1].float(), *wide, ctx, spec)
        error = (out[row : row + 1].float() - expected).norm() / expected.norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 4e-3)
