"""The matrix products of few tokens on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.mark.parametrize("number", range(60))
def test_skinny_gemm(number: int) -> None:
    from benchmarks.skinny_gemm import check

    assert check(number) < 1e-2


@pytest.mark.parametrize("rows", [16384, 16392, 40000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_copies_in_pieces_multiply_as_a_whole_one(rows: int, dtype: torch.dtype) -> None:
    from benchmarks.skinny_gemm import make_weight
    from lmdeploy.kernels.cuda import affine, skinny_gemm

    torch.manual_seed(rows)
    w, _ = make_weight(rows, 256, 128, zeros=True)
    whole = skinny_gemm.dequantize(w, dtype)
    assert torch.equal(skinny_gemm.dequantize(w, dtype, 48, 100), whole[48:100])
    assert torch.equal(skinny_gemm.dequantize(w, dtype, 32), whole[32:])
    for tokens in (65, 300):
        x = torch.randn(tokens, 256, device="cuda", dtype=dtype)
        packed = affine.PackedAffine(w)
        in_pieces = affine.linear(x, packed).double()
        packed.keep_copy(dtype)
        for expected in (affine.linear(x, packed).double(), x.double() @ whole.double().T):
            assert (in_pieces - expected).abs().max() <= 1e-2 * expected.abs().max()


@pytest.mark.parametrize("addends", [{"bias"}, {"residual"}, {"bias", "residual"}, {"out_dtype"}], ids=" ".join)
def test_pieces_of_a_product_take_what_is_added_to_them(addends: set[str]) -> None:
    from benchmarks.skinny_gemm import make_weight
    from lmdeploy.kernels.cuda import affine

    torch.manual_seed(0)
    w, _ = make_weight(16392, 256, 128, zeros=True)
    x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    given = {"bias": torch.randn_like(x[0, :1].expand(16392)), "residual": torch.randn_like(x[:, :1].expand(-1, 16392))}

    def multiply(packed: affine.PackedAffine) -> torch.Tensor:
        named = {name: value.clone() for name, value in given.items() if name in addends}
        return affine.linear(x, packed, **named, out_dtype=torch.float32 if "out_dtype" in addends else None)

    packed = affine.PackedAffine(w)
    in_pieces = multiply(packed)
    packed.keep_copy(x.dtype)
    whole = multiply(packed)
    assert in_pieces.dtype == whole.dtype
    assert (in_pieces - whole).abs().max() <= 1e-2 * whole.abs().max()
