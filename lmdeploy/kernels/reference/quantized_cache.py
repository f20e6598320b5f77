"""Vectors of the KV cache stored in 8 or 4 bits, in plain PyTorch. It knows blocks of one layer, no cache and no policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PARAM_BYTES = 4  # scale and minimum in float16

_HALF_MAX = 65504.0
_FLOAT8_MAX = 448.0  # of e4m3; e5m2 reaches further but is no finer there


@dataclass(frozen=True)
class CodeFormat:
    """How a vector of D numbers is stored beside its own scale and minimum.

    bits: of one element, 8 or 4; of 4, element d shares a byte with d + D / 2 and has the low half. is_rotated: the
    vector is stored as its Hadamard transform, which spreads an outlier over all elements. https://arxiv.org/abs/2404.00456
    float_type: an 8-bit float type in place of unsigned integers; the minimum is then 0.
    """

    bits: int
    is_rotated: bool = False
    float_type: torch.dtype | None = None

    def code_bytes(self, dim: int) -> int:
        """Bytes of the codes of one vector."""
        return dim * self.bits // 8


@dataclass(frozen=True)
class QuantizedBlocks:
    """The keys or the values of one layer.

    codes: [NB, Hkv, S, D * bits / 8] uint8. params: [NB, Hkv, S, 2] float16, scale and minimum of each vector.
    """

    codes: Tensor
    params: Tensor
    format: CodeFormat

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """What a vector's two parts, as `encode` gives them, are written to."""
        return self.codes, self.params

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors [.., D] -> codes [.., D * bits / 8] and params [.., 2]. Each vector's result depends on it alone."""
        return quantize(self.rotate(x), self.format)

    def decode(self, codes: Tensor, params: Tensor) -> Tensor:
        """What was stored, [.., D] float32, still rotated."""
        return dequantize(codes, params, self.format)

    def rotate(self, x: Tensor) -> Tensor:
        """To the basis in which vectors [.., D] are stored, and just as well back from it; float32."""
        return hadamard(x.float()) if self.format.is_rotated else x.float()


def quantize(x: Tensor, format: CodeFormat) -> tuple[Tensor, Tensor]:
    """Codes and params of vectors [.., D] float32, each with scale = (max - min) / (2^bits - 1), code = (x - min) / scale.

    The codes are those for the scale and minimum as they are stored, in float16.
    """
    if format.float_type is not None:
        scale = _half(x.abs().amax(-1, keepdim=True) / _FLOAT8_MAX)
        codes = (x / _divisor(scale)).clamp(-_FLOAT8_MAX, _FLOAT8_MAX).to(format.float_type).view(torch.uint8)
        return codes, torch.cat((scale, torch.zeros_like(scale)), dim=-1)
    levels = (1 << format.bits) - 1
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale, minimum = _half((high - low) / levels), _half(low)
    codes = ((x - minimum.float()) / _divisor(scale)).round().clamp(0, levels).to(torch.uint8)
    if format.bits == 4:
        first, second = codes.chunk(2, dim=-1)
        codes = first | second << 4
    return codes, torch.cat((scale, minimum), dim=-1)


def dequantize(codes: Tensor, params: Tensor, format: CodeFormat) -> Tensor:
    """code * scale + minimum: codes [.., D * bits / 8], params [.., 2] -> [.., D] float32."""
    if format.bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), dim=-1)
    numbers = (codes if format.float_type is None else codes.view(format.float_type)).float()
    scale, minimum = params.float().split(1, dim=-1)
    return torch.addcmul(minimum, numbers, scale)


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Hadamard transform of each vector [.., D], its own inverse.

    Where D is no power of two, each piece of the largest power of two that divides D is transformed by itself. Sums of two
    at a time, never a matrix product, so that a vector's result does not depend on how many others there are.
    """
    dim = x.shape[-1]
    size = dim & -dim
    pieces = x.unflatten(-1, (-1, size))
    for _ in range(size.bit_length() - 1):
        even, odd = pieces[..., 0::2], pieces[..., 1::2]
        pieces = torch.cat((even + odd, even - odd), dim=-1)
    return (pieces * size**-0.5).flatten(-2)


def _half(x: Tensor) -> Tensor:
    """Float16, what is too large for it cut to its largest number."""
    return x.clamp(-_HALF_MAX, _HALF_MAX).half()


def _divisor(scale: Tensor) -> Tensor:
    """The scale in float32; 1 where it is 0, since then all codes are 0 anyway."""
    return torch.where(scale == 0, 1.0, scale.float())
