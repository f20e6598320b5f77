"""GGUF's block formats as affine tensors, without any loss, or else as dense ones. It knows no file and no tensor's name.

Layouts: ggml-quants.h of https://github.com/ggml-org/ggml. A block holds the integers of 32 or 256 adjacent channels, in
planes: bits 0 and up of the bytes of a span are its first channels, the next bits the channels after those, and so on.
Scales of scales are multiplied out; every such product is exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from lmdeploy.errors import CheckpointError
from lmdeploy.quantization.packing import AffineTensor

_DENSE = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.F64: torch.float64,
}
Parts = tuple[Tensor, Tensor, Tensor]


def tensor_kind(ggml_type: int) -> str:
    """What `read_tensor` makes of the type: dense, affine4 or affine8."""
    layout = _AFFINE.get(GGMLQuantizationType(ggml_type))
    return "dense" if layout is None else f"affine{layout.bits}"


def read_tensor(data: Tensor, ggml_type: int, shape: tuple[int, ...]) -> Tensor | AffineTensor:
    """The tensor whose bytes are data [size_bytes] uint8. Raises CheckpointError for a type nothing can dequantize.

    Dense 16 and 32-bit types are views of data; types that are no affine code come back in float32.
    """
    kind = GGMLQuantizationType(ggml_type)
    if kind in _DENSE:
        return data.view(_DENSE[kind]).view(shape)
    layout = _AFFINE.get(kind)
    if layout is None:
        return _dequantize(data, kind, shape)
    q, scales, mins = layout.unpack(data.view(-1, GGML_QUANT_SIZES[kind][1]))
    groups = (*shape[:-1], -1)
    return AffineTensor(q.view(shape), scales.view(groups), mins.view(groups), layout.bits)


def _dequantize(data: Tensor, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> Tensor:
    from gguf.quants import dequantize

    try:
        values = dequantize(data.view(*shape[:-1], -1).numpy(), kind)
    except NotImplementedError as error:
        raise CheckpointError(
            f"GGUF tensors of type {kind.name} cannot be read; requantize the file to Q4_K_M"
        ) from error
    return torch.from_numpy(values).view(shape)


def _planes(raw: Tensor, span: int, bits: int) -> Tensor:
    """Unsigned integers of `bits` bits from bytes [B, n], each span of bytes plane by plane: [B, n * 8 / bits]."""
    blocks, size = raw.shape
    out = torch.empty(blocks, size // span, 8 // bits, span, dtype=torch.uint8)
    # Eight bytes at a time where spans allow it: the shift moves bits across bytes, the mask drops those that crossed.
    word, mask = (torch.int64, 0x0101010101010101) if span % 8 == 0 else (torch.uint8, 1)
    spans = raw.contiguous().view(word).view(blocks, size // span, -1)
    for plane, target in enumerate(out.view(word).unbind(2)):
        torch.bitwise_right_shift(spans, plane * bits, out=target)
        target &= ((1 << bits) - 1) * mask
    return out.view(blocks, -1)


def _half(raw: Tensor) -> Tensor:
    """float16 numbers from bytes [B, 2 n]: float32 [B, n]."""
    return raw.contiguous().view(torch.float16).float()


def _q4_0(block: Tensor) -> Parts:
    scales = _half(block[:, :2])
    return _planes(block[:, 2:], 16, 4), scales, -8 * scales


def _q4_1(block: Tensor) -> Parts:
    return _planes(block[:, 4:], 16, 4), _half(block[:, :2]), _half(block[:, 2:4])


def _q5_0(block: Tensor) -> Parts:
    scales = _half(block[:, :2])
    return _planes(block[:, 6:], 16, 4) | _planes(block[:, 2:6], 1, 1) << 4, scales, -16 * scales


def _q5_1(block: Tensor) -> Parts:
    q = _planes(block[:, 8:], 16, 4) | _planes(block[:, 4:8], 1, 1) << 4
    return q, _half(block[:, :2]), _half(block[:, 2:4])


def _q8_0(block: Tensor) -> Parts:
    scales = _half(block[:, :2])
    return block[:, 2:] ^ 0x80, scales, -128 * scales  # flipping the sign bit of an int8 adds 128


def _q2_k(block: Tensor) -> Parts:
    scale, minimum = _half(block[:, 80:82]), _half(block[:, 82:84])
    return _planes(block[:, 16:80], 32, 2), scale * (block[:, :16] & 15), -minimum * (block[:, :16] >> 4)


def _q3_k(block: Tensor) -> Parts:
    q = _planes(block[:, 32:96], 32, 2) | _planes(block[:, :32], 32, 1) << 2
    low, high = _planes(block[:, 96:104], 8, 4), _planes(block[:, 104:108], 4, 2)
    scales = _half(block[:, 108:110]) * ((low | high << 4).float() - 32)
    return q, scales, -4 * scales


def _six_bit_pairs(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 sub-scales and 8 sub-minima, of 6 bits each, that Q4_K and Q5_K keep in 12 bytes: [B, 8] both."""
    first, second, third = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = torch.cat((first & 63, third & 15 | (first >> 2 & 48)), dim=1)
    minima = torch.cat((second & 63, third >> 4 | (second >> 2 & 48)), dim=1)
    return scales, minima


def _q4_k(block: Tensor) -> Parts:
    scales, minima = _six_bit_pairs(block[:, 4:16])
    return _planes(block[:, 16:], 32, 4), _half(block[:, :2]) * scales, -_half(block[:, 2:4]) * minima


def _q5_k(block: Tensor) -> Parts:
    scales, minima = _six_bit_pairs(block[:, 4:16])
    q = _planes(block[:, 48:], 32, 4) | _planes(block[:, 16:48], 32, 1) << 4
    return q, _half(block[:, :2]) * scales, -_half(block[:, 2:4]) * minima


def _q6_k(block: Tensor) -> Parts:
    q = _planes(block[:, :128], 64, 4) | _planes(block[:, 128:192], 32, 2) << 4
    scales = _half(block[:, 208:210]) * block[:, 192:208].contiguous().view(torch.int8)
    return q, scales, -32 * scales


class _Layout(NamedTuple):
    bits: int
    unpack: Callable[[Tensor], Parts]  # [B, bytes] -> q [B, channels], scales and minima [B, groups of a block]


_AFFINE = {
    GGMLQuantizationType.Q4_0: _Layout(4, _q4_0),
    GGMLQuantizationType.Q4_1: _Layout(4, _q4_1),
    GGMLQuantizationType.Q5_0: _Layout(8, _q5_0),
    GGMLQuantizationType.Q5_1: _Layout(8, _q5_1),
    GGMLQuantizationType.Q8_0: _Layout(8, _q8_0),
    GGMLQuantizationType.Q2_K: _Layout(4, _q2_k),
    GGMLQuantizationType.Q3_K: _Layout(4, _q3_k),
    GGMLQuantizationType.Q4_K: _Layout(4, _q4_k),
    GGMLQuantizationType.Q5_K: _Layout(8, _q5_k),
    GGMLQuantizationType.Q6_K: _Layout(8, _q6_k),
}
