"""Vectors in 8 and 4 bits: the transform, the error of a round trip, where the bits lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels.reference.quantized_cache import CodeFormat, QuantizedBlocks, dequantize, hadamard, quantize

FORMATS = {
    "int8": CodeFormat(8),
    "int8 rotated": CodeFormat(8, is_rotated=True),
    "int4": CodeFormat(4),
    "int4 rotated": CodeFormat(4, is_rotated=True),
    "fp8": CodeFormat(8, float_type=torch.float8_e4m3fn),
    "fp8_e5m2": CodeFormat(8, float_type=torch.float8_e5m2),
}
INTEGERS = [name for name in FORMATS if "fp8" not in name]


def hadamard_matrix(size: int) -> Tensor:
    """Entry (i, j) is the parity of the bits that i and j share. float64."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


def vectors(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, one channel of each vector ten times as large and all of them shifted."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 10
    return x + 0.5


def blocks(dim: int, format: CodeFormat) -> QuantizedBlocks:
    return QuantizedBlocks(
        torch.zeros(4, 2, 8, format.code_bytes(dim), dtype=torch.uint8), torch.zeros(4, 2, 8, 2).half(), format
    )


@pytest.mark.parametrize(("dim", "piece"), [(8, 8), (64, 64), (80, 16), (96, 32), (112, 16), (128, 128), (256, 256)])
def test_the_transform_is_its_own_inverse_and_the_matrix_of_each_piece(dim: int, piece: int) -> None:
    x = vectors(5, dim)
    expected = torch.cat([part.double() @ hadamard_matrix(piece) for part in x.split(piece, dim=-1)], dim=-1)
    torch.testing.assert_close(hadamard(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("name", INTEGERS)
def test_an_element_is_off_by_half_a_step_at_most(name: str, dim: int) -> None:
    cache = blocks(dim, FORMATS[name])
    x = vectors(50, 2, dim)
    codes, params = cache.encode(x)
    assert (codes.dtype, codes.shape) == (torch.uint8, (50, 2, dim * FORMATS[name].bits // 8))
    stored = cache.rotate(x)
    low, high = stored.amin(-1, keepdim=True), stored.amax(-1, keepdim=True)
    step = (high - low) / (2 ** FORMATS[name].bits - 1)
    half_rounding = 2**-11 * (low.abs() + high - low)
    assert ((cache.decode(codes, params) - stored).abs() <= 0.5 * step + half_rounding + 1e-5).all()
    torch.testing.assert_close(params[..., :1].float(), step, rtol=2**-11, atol=0)
    torch.testing.assert_close(params[..., 1:].float(), low, rtol=2**-11, atol=0)


@pytest.mark.parametrize(("name", "relative"), [("fp8", 2**-4), ("fp8_e5m2", 2**-3)])
def test_a_float_keeps_its_relative_precision(name: str, relative: float) -> None:
    x = vectors(50, 2, 64) * torch.logspace(-3, 3, 50)[:, None, None]
    back = dequantize(*quantize(x, FORMATS[name]), FORMATS[name])
    bound = (relative + 2**-10) * x.abs() + x.abs().amax(-1, keepdim=True) * 2**-15
    assert ((back - x).abs() <= bound).all()
    assert (back - x).abs().max() > 0


def test_rotation_spreads_an_outlier() -> None:
    """One channel a hundred times the others costs plain 4-bit codes all the rest of the vector."""
    x = vectors(200, 1, 128)
    x[..., 3] = 100
    errors = {}
    for name in ("int4", "int4 rotated"):
        cache = blocks(128, FORMATS[name])
        errors[name] = (cache.rotate(cache.decode(*cache.encode(x))) - x).square().mean().item()
    assert errors["int4 rotated"] < 0.4 * errors["int4"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_vector_is_stored_alike_alone_and_among_others(name: str) -> None:
    cache = blocks(96, FORMATS[name])
    x = vectors(33, 2, 96)
    codes, params = cache.encode(x)
    for row in (0, 7, 32):
        alone_codes, alone_params = cache.encode(x[row : row + 1].clone())
        assert torch.equal(alone_codes[0], codes[row])
        assert torch.equal(alone_params[0], params[row])


def test_where_the_halves_of_a_byte_belong() -> None:
    codes, params = quantize(torch.arange(16.0), CodeFormat(4))
    assert codes.tolist() == [low | (low + 8) << 4 for low in range(8)]
    assert params.tolist() == [1.0, 0.0]
    assert dequantize(codes, params, CodeFormat(4)).tolist() == list(range(16))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1.5, -3.0, 1e-9])
def test_a_constant_vector(name: str, value: float) -> None:
    cache = blocks(64, FORMATS[name])
    x = torch.full((1, 64), value)
    back = cache.rotate(cache.decode(*cache.encode(x)))
    torch.testing.assert_close(back, x, rtol=2e-3, atol=0.1 if "rotated" in name else 1e-7)


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_beyond_half_precision_stay_finite(name: str) -> None:
    cache = blocks(64, FORMATS[name])
    assert cache.decode(*cache.encode(vectors(4, 64) * 1e8)).isfinite().all()
