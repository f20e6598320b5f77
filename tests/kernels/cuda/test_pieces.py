"""Products of many tokens with 4-bit weights of which some rows at a time are copied, where what copies them stands in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels import invariant
from lmdeploy.kernels.cuda import affine, dense, skinny_gemm
from lmdeploy.kernels.cuda.skinny_gemm import Weight

N, K, TOKENS = 40, 128, 70


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> affine.PackedAffine:
    """A weight [N, K] that is copied in three pieces; its whole copy is not kept."""
    torch.manual_seed(0)
    scales = (torch.rand(N, 1) + 0.1).half().float()
    weight = affine.pack(torch.randint(0, 16, (N, K), dtype=torch.uint8), scales, -8 * scales, 4)

    def dequantize(w: Weight, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        assert start % 16 == 0
        q, scales, mins = skinny_gemm.unpack(w)
        return (q * scales + mins)[start:stop].to(dtype)

    monkeypatch.setattr(skinny_gemm, "dequantize", dequantize)
    monkeypatch.setattr(affine, "_ROWS_AT_ONCE", 16)
    monkeypatch.setattr(dense, "_HAS_WIDE_OUTPUT", False)  # which a CPU does not have
    return weight


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize(("has_residual", "out_dtype"), [(False, None), (False, torch.float32), (True, None)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_pieces_come_to_the_whole(
    packed: affine.PackedAffine,
    monkeypatch: pytest.MonkeyPatch,
    has_bias: bool,
    has_residual: bool,
    out_dtype: torch.dtype | None,
    is_deterministic: bool,
) -> None:
    monkeypatch.setattr(invariant, "_is_on", is_deterministic)
    x = torch.randn(TOKENS, K, dtype=torch.bfloat16)
    bias = torch.randn(N, dtype=torch.bfloat16) if has_bias else None
    residual = torch.randn(TOKENS, N, dtype=torch.bfloat16) if has_residual else None
    whole = x.double() @ skinny_gemm.dequantize(packed.weight, torch.bfloat16).double().T
    for addend in (bias, residual):
        whole = whole if addend is None else whole + addend.double()
    result = affine.linear(x, packed, bias=bias, residual=residual, out_dtype=out_dtype)
    assert result.dtype == (out_dtype or torch.bfloat16)
    assert (result - whole).abs().max() <= 1e-2 * whole.abs().max()


def test_no_piece_exceeds_the_rows_that_the_plan_counts(
    packed: affine.PackedAffine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[tuple[int, int]] = []
    dequantize = skinny_gemm.dequantize

    def record(w: Weight, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        pieces.append((start, stop))
        return dequantize(w, dtype, start, stop)

    monkeypatch.setattr(skinny_gemm, "dequantize", record)
    x = torch.randn(TOKENS, K, dtype=torch.bfloat16)
    residual = torch.randn(TOKENS, N, dtype=torch.bfloat16)
    assert affine.linear(x, packed, residual=residual).data_ptr() == residual.data_ptr()
    assert pieces == [(0, 16), (16, 32), (32, 40)]
    assert packed.piece_bytes == max(stop - start for start, stop in pieces) * K * x.itemsize
