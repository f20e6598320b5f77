# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-redef"
# ruff: noqa: RET505, SIM108 (in a kernel both ways of a constant condition are written out)
"""Vectors of the KV cache as kernels see them: addresses, conversion to codes and back. It knows no attention.

The bits are those of `lmdeploy.kernels.reference.quantized_cache`. Formats go by name: "plain", "int8", "int4", "e4m3", "e5m2".
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.kernels.reference.quantized_cache import CodeFormat, QuantizedBlocks

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

Blocks = Tensor | QuantizedBlocks

_HALF_MAX = tl.constexpr(65504.0)
_FLOAT8_MAX = tl.constexpr(448.0)
# Adding and subtracting it rounds a float32 below 2^22 to the nearest integer, halves to even.
_ROUNDER = tl.constexpr(12582912.0)


class Side(NamedTuple):
    """The keys or the values of one layer, ready to be passed to a kernel.

    codes: [NB, Hkv, S, bytes or D]. params: [NB, Hkv, S] int32, scale in the low and minimum in the high half (codes again
    for plain blocks). piece: length of the transformed pieces of a vector, 1 if it is stored as it is.
    """

    codes: Tensor
    params: Tensor
    format: str
    piece: int


def side(blocks: Blocks, dim: int) -> Side:
    """How kernels see keys or values of vectors of `dim` elements."""
    if isinstance(blocks, Tensor):
        return Side(blocks, blocks, "plain", 1)
    piece = dim & -dim if blocks.format.is_rotated else 1
    return Side(blocks.codes, blocks.params.view(torch.int32)[..., 0], _name(blocks.format), piece)


def in_units(part: Side) -> Side:
    """With the codes in units of 16 bits, [NB, Hkv, S, bytes / 2] int16."""
    return part if part.format == "plain" else part._replace(codes=part.codes.view(torch.int16))


def _name(format: CodeFormat) -> str:
    if format.float_type is None:
        return "int4" if format.bits == 4 else "int8"
    return "e5m2" if format.float_type == torch.float8_e5m2 else "e4m3"


def attention_dtype(blocks: Blocks, dtype: torch.dtype) -> torch.dtype:
    """Of queries in a model of `dtype`: codes are exact in float16, and only there cheap to convert to."""
    return dtype if isinstance(blocks, Tensor) or dtype == torch.float32 else torch.float16


@triton.jit
def hadamard(x, PIECE: tl.constexpr, STAGES: tl.constexpr):
    """The orthonormal transform of each piece of the rows x: [N, DP] float32; PIECE = 2^STAGES."""
    d = tl.arange(0, x.shape[1])[None, :]
    for stage in tl.static_range(STAGES):
        partner = tl.gather(x, tl.broadcast_to(d ^ (1 << stage), x.shape), 1)
        x = tl.where((d & (1 << stage)) != 0, partner - x, x + partner)
    return x * (PIECE**-0.5)


@triton.jit
def round_to_half(x):
    """Float16, what is too large for it cut to its largest number."""
    return tl.minimum(tl.maximum(x, -_HALF_MAX), _HALF_MAX).to(tl.float16)


@triton.jit
def float8_bits(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """The nearest 8-bit floats of x: float32, within their range, as int32; also where no hardware converts."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    shift: tl.constexpr = 23 - MANTISSA
    rounded = magnitude + ((1 << (shift - 1)) - 1) + ((magnitude >> shift) & 1)
    normal = (rounded >> shift) - ((127 - BIAS) << MANTISSA)
    # A float32 whose last bit weighs as much as the smallest 8-bit float: adding it rounds what is subnormal.
    unit: tl.constexpr = (127 - BIAS + shift + 1) << 23
    unit_bits = tl.full(x.shape, unit, tl.int32)
    sum_ = magnitude.to(tl.float32, bitcast=True) + unit_bits.to(tl.float32, bitcast=True)
    subnormal = sum_.to(tl.int32, bitcast=True) - unit
    return sign | tl.where(magnitude < ((128 - BIAS) << 23), subnormal, normal)


@triton.jit
def encode(x, live, FORMAT: tl.constexpr):
    """Rows x: [N, DP] float32, of which `live` [1, DP] elements count -> codes [N, DP] int32, params [N] int32."""
    if FORMAT == "e4m3" or FORMAT == "e5m2":
        largest = tl.max(tl.where(live, tl.abs(x), 0.0), axis=1)
        scale = round_to_half(tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32)))
        minimum = tl.zeros_like(scale)
        wide = scale.to(tl.float32)
        divisor = tl.where(wide == 0, 1.0, wide)[:, None]
        bounded = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
        bounded = tl.minimum(tl.maximum(bounded, -_FLOAT8_MAX), _FLOAT8_MAX)
        if FORMAT == "e4m3":
            codes = float8_bits(bounded, 3, 7)
        else:
            codes = float8_bits(bounded, 2, 15)
    else:
        LEVELS: tl.constexpr = 15.0 if FORMAT == "int4" else 255.0
        low = tl.min(tl.where(live, x, float("inf")), axis=1)
        high = tl.max(tl.where(live, x, float("-inf")), axis=1)
        scale = round_to_half(tl.div_rn(high - low, tl.full(low.shape, LEVELS, tl.float32)))
        minimum = round_to_half(low)
        wide = scale.to(tl.float32)
        divisor = tl.where(wide == 0, 1.0, wide)[:, None]
        steps = tl.div_rn(x - minimum.to(tl.float32)[:, None], tl.broadcast_to(divisor, x.shape))
        # Cut first: the rounding constant serves small numbers only, and the bounds are integers.
        steps = tl.minimum(tl.maximum(steps, 0.0), LEVELS)
        codes = ((steps + _ROUNDER) - _ROUNDER).to(tl.int32)
    low_half = scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return codes, low_half | (minimum.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def scale_of(params):
    """float32 from the packed params."""
    return (params & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def minimum_of(params):
    """float32 from the packed params."""
    return (params >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def element_of(unit, PART: tl.constexpr, FORMAT: tl.constexpr, D: tl.constexpr):
    """Which element of a vector part `PART` of its 16-bit unit is: 8-bit codes have two parts, 4-bit codes four."""
    if FORMAT == "plain":
        return unit
    elif FORMAT == "int4":
        return 2 * unit + PART // 2 + (PART % 2) * (D // 2)
    else:
        return 2 * unit + PART


@triton.jit
def part_of(codes, PART: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """One part of 16-bit units of codes: int16, as float16 or float32, exactly; e4m3 divided by 256 (see `float8_factor`).

    In units of 16 bits a tile of codes reaches the tensor cores' registers as a tile of float16 would.
    """
    if ASM and tl.float16 == DTYPE:
        return _part_in_ptx(codes, PART, FORMAT)
    elif FORMAT == "int4":
        return ((codes >> (4 * PART)) & 15).to(DTYPE)
    elif FORMAT == "int8":
        return ((codes >> (8 * PART)) & 255).to(DTYPE)
    else:
        return float8_to((codes >> (8 * PART)) & 255, FORMAT, DTYPE)


# For two units a register. An integer n below 1024 under the bits 0x6400 is the float16 1024 + n.
_INT8_0 = tl.constexpr(
    "{.reg .b32 c, x; mov.b32 c, 0x64006400; prmt.b32 x, $1, 0x64646464, 0x4240; sub.rn.f16x2 $0, x, c;}"
)
_INT8_1 = tl.constexpr(
    "{.reg .b32 c, x; mov.b32 c, 0x64006400; prmt.b32 x, $1, 0x64646464, 0x4341; sub.rn.f16x2 $0, x, c;}"
)
_INT4_0 = tl.constexpr(
    "{.reg .b32 c, x; mov.b32 c, 0x64006400; lop3.b32 x, $1, 0x000f000f, c, 0xea; sub.rn.f16x2 $0, x, c;}"
)
# 1024 + 16 n, times 1 / 16, less 64.
_INT4_1 = tl.constexpr(
    "{.reg .b32 c, f, x; mov.b32 c, 0x64006400; lop3.b32 x, $1, 0x00f000f0, c, 0xea;"
    "mov.b32 f, 0x2c002c00; mov.b32 c, 0xd400d400; fma.rn.f16x2 $0, x, f, c;}"
)
_INT4_2 = tl.constexpr(
    "{.reg .b32 c, x; mov.b32 c, 0x64006400; shr.u32 x, $1, 8; lop3.b32 x, x, 0x000f000f, c, 0xea;"
    "sub.rn.f16x2 $0, x, c;}"
)
_INT4_3 = tl.constexpr(
    "{.reg .b32 c, f, x; mov.b32 c, 0x64006400; shr.u32 x, $1, 8; lop3.b32 x, x, 0x00f000f0, c, 0xea;"
    "mov.b32 f, 0x2c002c00; mov.b32 c, 0xd400d400; fma.rn.f16x2 $0, x, f, c;}"
)
# The sign to bit 15, the rest to bits 7 to 13; the upper bit of the exponent stays 0.
_E4M3_0 = tl.constexpr(
    "{.reg .b32 s, x; shl.b32 s, $1, 8; and.b32 s, s, 0x80008000; shl.b32 x, $1, 7; lop3.b32 $0, x, 0x3f803f80, s, 0xea;}"
)
_E4M3_1 = tl.constexpr(
    "{.reg .b32 s, x; and.b32 s, $1, 0x80008000; shr.u32 x, $1, 1; lop3.b32 $0, x, 0x3f803f80, s, 0xea;}"
)
_E5M2_0 = tl.constexpr("{.reg .b32 x; shl.b32 x, $1, 8; and.b32 $0, x, 0xff00ff00;}")
_E5M2_1 = tl.constexpr("and.b32 $0, $1, 0xff00ff00;")


@triton.jit
def _part_in_ptx(codes, PART: tl.constexpr, FORMAT: tl.constexpr):
    if FORMAT == "int8":
        ASM: tl.constexpr = _INT8_0 if PART == 0 else _INT8_1
    elif FORMAT == "int4":
        ASM: tl.constexpr = _INT4_0 if PART == 0 else _INT4_1 if PART == 1 else _INT4_2 if PART == 2 else _INT4_3
    elif FORMAT == "e4m3":
        ASM: tl.constexpr = _E4M3_0 if PART == 0 else _E4M3_1
    else:
        ASM: tl.constexpr = _E5M2_0 if PART == 0 else _E5M2_1
    return tl.inline_asm_elementwise(ASM, "=r,r", [codes], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def float8_to(codes, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """8-bit floats as float16 or float32, exactly, those of e4m3 divided by 256 (see `float8_factor`)."""
    wide = codes.to(tl.int16)
    if FORMAT == "e4m3":
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    else:
        bits = wide << 8
    return bits.to(tl.float16, bitcast=True).to(DTYPE)


@triton.jit
def float8_factor(FORMAT: tl.constexpr):
    """What `float8_to` leaves out: the exponents of e4m3 and float16 are biased by 7 and 15."""
    return 256.0 if FORMAT == "e4m3" else 1.0
