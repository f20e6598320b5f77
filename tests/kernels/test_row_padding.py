"""Products in 16 bits on a CPU have few shapes, whatever lengths prompts have, so that compiled ones do not pile up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lmdeploy.bench.process_memory import rss_bytes
from lmdeploy.kernels import invariant
from lmdeploy.kernels.reference.attention import paged_attention
from lmdeploy.kernels.spec import AttentionSpec
from tests.kernels.triton.steps import make_step

LENGTHS = range(17, 513)
MIB = 1 << 20
TELLS_MEMORY = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells what is resident")


def test_sizes_are_few_and_close() -> None:
    sizes = {rows: invariant.padded_rows(rows) for rows in range(4097)}
    assert all(sizes[rows] == rows for rows in range(33))
    assert all(0 <= padded - rows < max(1, rows / 8) for rows, padded in sizes.items())
    assert all(sizes[padded] == padded for padded in set(sizes.values()) if padded <= 4096)
    assert len({sizes[rows] for rows in LENGTHS}) == 48


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 7, 33, 65, 300])
@pytest.mark.parametrize("with_bias", [True, False])
def test_padding_changes_no_row(dtype: torch.dtype, count: int, with_bias: bool) -> None:
    torch.manual_seed(count)
    x, weight, bias = torch.randn(count, 64), torch.randn(48, 64), torch.randn(48)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    result = invariant.linear(x, weight, bias if with_bias else None)
    expected = F.linear(x.double(), weight.double(), bias.double() if with_bias else None)
    assert result.shape == (count, 48)
    assert result.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert torch.allclose(result.double(), expected, rtol=tolerance, atol=tolerance * 10)


@TELLS_MEMORY
@torch.inference_mode()
def test_memory_is_flat_over_prompts_of_any_length() -> None:
    weights = [torch.randn(size, 64).bfloat16() for size in (64, 128, 256)]

    def multiply(rows: int) -> None:
        for weight in weights:
            invariant.linear(torch.ones(rows, 64, dtype=torch.bfloat16), weight)

    for rows in {invariant.padded_rows(rows) for rows in LENGTHS}:
        multiply(rows)
    before = rss_bytes()
    for rows in LENGTHS:
        multiply(rows)
    assert rss_bytes() - before < 16 * MIB  # one compiled product for each length would be 500 MiB


@TELLS_MEMORY
@torch.inference_mode()
def test_memory_of_attention_without_kernels_is_flat_over_contexts_of_any_length() -> None:
    spec = AttentionSpec(4, 2, 64, 64, 0.125)
    keys, values = torch.randn(2, 40, 2, 16, 64).bfloat16()

    def attend(query_len: int, context_len: int) -> None:
        ctx = make_step([query_len], [context_len], 40, 16, torch.device("cpu"))
        paged_attention(torch.ones(query_len, 4, 64, dtype=torch.bfloat16), keys, values, ctx, spec)

    attend(1, 500)
    attend(300, 500)
    before = rss_bytes()
    for context_len in range(20, 500, 2):
        attend(1, context_len)
        attend(context_len - 10, context_len)
    assert rss_bytes() - before < 16 * MIB  # one compiled product for each length would be 300 MiB
