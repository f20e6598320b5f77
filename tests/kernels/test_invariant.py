"""Once an engine asks for it, rows have the same bits whatever other rows there are, on the paths without kernels as well."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels import aten_affine, invariant
from lmdeploy.kernels.reference import attention
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.layers.context import ForwardContext
from tests.kernels.triton.steps import make_step

CPU = torch.device("cpu")
LENGTHS = [5, 17, 100, 333, 700]


@pytest.fixture(autouse=True)
def is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariant, "_is_on", True)


def alone(ctx: ForwardContext, row: int) -> ForwardContext:
    rows = slice(row, row + 1)
    return replace(
        ctx, positions=ctx.positions[rows], cu_seqlens_q=ctx.cu_seqlens_q[:2], context_lens=ctx.context_lens[rows],
        block_tables=ctx.block_tables[rows], slot_mapping=ctx.slot_mapping[rows], prompt_lens=ctx.prompt_lens[rows],
        query_lens=[1], context_lens_host=[ctx.context_lens_host[row]], cache={},
    )  # fmt: skip


def test_answers_attend_without_kernels_as_each_alone() -> None:
    torch.manual_seed(0)
    spec = AttentionSpec(4, 2, 64, 64, 0.125)
    ctx = make_step([1] * len(LENGTHS), LENGTHS, 100, 16, CPU)
    keys, values = torch.randn(2, 100, 2, 16, 64)
    q, qkv, frequencies = (torch.randn(len(LENGTHS), *size) for size in ((4, 64), (8 * 64,), (32,)))

    def attend(rows: slice, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        stored = keys.clone(), values.clone()
        plain = attention.paged_attention(q[rows], *stored, ctx, spec)
        return plain, attention.store_rotate_attend(qkv[rows], frequencies[rows], *stored, ctx, spec)

    together = attend(slice(None), ctx)
    for row in range(len(LENGTHS)):
        rows = slice(row, row + 1)
        for part, whole in zip(attend(rows, alone(ctx, row)), together, strict=True):
            assert torch.equal(part, whole[rows]), row


@pytest.mark.parametrize("count", [1, 2, 3, 16, 33])
def test_products_of_heads_in_blocks(count: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 16, 128), torch.randn(16, 128, 512)

    def product(rows: Tensor) -> Tensor:
        return torch.einsum("thn,hnl->thl", rows, weight)

    out = invariant.in_blocks(product, x[:count])
    assert torch.equal(out, invariant.in_blocks(product, x)[:count])
    torch.testing.assert_close(out, product(x[:count]))


def test_torchs_own_4_bit_product_in_pieces() -> None:
    torch.manual_seed(0)
    scales = torch.rand(64, 8) * 0.1
    w = aten_affine.pack(torch.randint(0, 16, (64, 256), dtype=torch.uint8), scales, -7 * scales, 4)
    x, residual = torch.randn(21, 256).bfloat16(), torch.randn(21, 64).bfloat16()
    together = aten_affine.linear(x, w, residual=residual)
    for count in (1, 3, 8, 9, 20):
        assert torch.equal(aten_affine.linear(x[:count], w, residual=residual[:count]), together[:count])
