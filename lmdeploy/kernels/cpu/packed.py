"""Affine 4 and 8-bit weights in the layout that the C++ kernels read (affine.h). It knows no checkpoint format."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property
from struct import Struct

import torch
from torch import Tensor

from lmdeploy.kernels.cpu.build import library
from lmdeploy.kernels.cpu.memory import allocate

ROWS = 16  # weight rows of a tile
_CONSTANT_ZERO, _MINIMUM, _ZERO_BYTE = 0, 1, 2
_PACK = Struct("6q")  # struct PackArgs of storage.cpp
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class _Descriptor(ctypes.Structure):
    """`struct Weight` of affine.h."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        ("meta", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("meta_stride", ctypes.c_int64),
        ("group", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("scale_is_f32", ctypes.c_int32),
        ("aux", ctypes.c_int32),
        ("zero", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


@dataclass(frozen=True, eq=False)
class PackedAffine:
    """A weight [n, k] of `bits` bits: w = q * scale + minimum per `group` input channels.

    q: packed integers. meta: per tile of 16 rows and group the scales, then nothing (every zero is `zero`), the minima
    or the zeros as bytes, as `aux` says. The tensors must not be moved or resized: the kernels hold their addresses.
    """

    q: Tensor
    meta: Tensor
    n: int
    k: int
    group: int
    bits: int
    scale_is_f32: bool
    aux: int
    zero: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight."""
        return self.q.numel() + self.meta.numel()

    @cached_property
    def _descriptor(self) -> _Descriptor:
        groups = self.k // self.group
        meta_stride = self.meta.numel() // (groups * -(-self.n // ROWS))
        sizes = (self.n, self.k, groups, meta_stride, self.group, self.bits)
        kind = (int(self.scale_is_f32), self.aux, self.zero, 0)
        return _Descriptor(self.q.data_ptr(), self.meta.data_ptr(), *sizes, *kind)

    @cached_property
    def address(self) -> int:
        """Where the kernels find the description of this weight."""
        return ctypes.addressof(self._descriptor)


def pack(q: Tensor, scales: Tensor, mins: Tensor, bits: int) -> PackedAffine:
    """Lay out w = q * scales + mins for the kernels.

    q: [N, K] uint8, one value each, below 2**bits; scales, mins: [N, G] with K = G * (16, 32, 64 or 128). Scales and
    minima are kept in float16 where that is exact, else in float32; minima that are -scale * (an integer) as integers.
    """
    n, k = q.shape
    group = k // max(1, scales.shape[1])
    if bits not in (4, 8) or group not in (16, 32, 64, 128) or scales.shape != (n, k // group) or k % group:
        raise ValueError(f"no CPU kernel for {bits} bits, weight {n} x {k}, scales {tuple(scales.shape)}")
    if mins.shape != scales.shape or q.dtype != torch.uint8:
        raise ValueError(f"mins {tuple(mins.shape)} must be like scales, q must be uint8, not {q.dtype}")
    scales, mins = scales.float(), mins.float()
    aux, zero, offsets = _offsets(scales, mins)
    wide = not _fits_half(scales) or (aux == _MINIMUM and not _fits_half(mins))
    meta = [_tiled(scales if wide else scales.half())]
    if offsets is not None:
        meta.append(_tiled(offsets if wide or aux == _ZERO_BYTE else offsets.half()))
    source = q.contiguous()
    packed = allocate(-(-n // ROWS) * ROWS * k * bits // 8)
    library().lm_pack(_PACK.pack(torch.get_num_threads(), source.data_ptr(), n, k, bits, packed.data_ptr()))
    tiled = torch.cat(meta, dim=2).flatten()
    return PackedAffine(packed, allocate(len(tiled)).copy_(tiled), n, k, group, bits, wide, aux, zero)


def unpack(w: PackedAffine) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack`: q [N, K] uint8, scales [N, G] and mins [N, G] float32."""
    tiles, groups = -(-w.n // ROWS), w.k // w.group
    if w.bits == 4:
        both = w.q.view(tiles, w.k // 8, ROWS, 1, 4)
        q = torch.cat((both & 15, both >> 4), dim=3)
    else:
        q = w.q.view(tiles, w.k // 4, ROWS, 4)
    q = q.transpose(1, 2).reshape(-1, w.k)[: w.n].contiguous()
    meta = w.meta.view(tiles, groups, -1)
    width = torch.float32 if w.scale_is_f32 else torch.float16
    size = ROWS * width.itemsize
    scales = _untiled(meta[..., :size], width, w.n)
    if w.aux == _CONSTANT_ZERO:
        return q, scales, -w.zero * scales
    offsets = _untiled(meta[..., size:], width if w.aux == _MINIMUM else torch.uint8, w.n)
    return q, scales, offsets if w.aux == _MINIMUM else -offsets * scales


def _offsets(scales: Tensor, mins: Tensor) -> tuple[int, int, Tensor | None]:
    """How to store the minima, losslessly: (aux, constant zero, what to store per group)."""
    zeros = torch.where(scales == 0, torch.zeros(()), torch.round(-mins / scales))
    if torch.equal(-zeros * scales, mins) and zeros.min() >= 0 and zeros.max() <= 255:
        constant = zeros.max()
        if torch.equal(-constant * scales, mins):
            return _CONSTANT_ZERO, int(constant), None
        return _ZERO_BYTE, 0, zeros.to(torch.uint8)
    return _MINIMUM, 0, mins


def _fits_half(x: Tensor) -> bool:
    return torch.equal(x.half().float(), x)


def _tiled(x: Tensor) -> Tensor:
    """[N, G] -> bytes [N / 16, G, 16 * itemsize], padded with zeros."""
    n, groups = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, 0, -n % ROWS))
    return padded.view(-1, ROWS, groups).transpose(1, 2).contiguous().view(torch.uint8)


def _untiled(meta: Tensor, dtype: torch.dtype, n: int) -> Tensor:
    values = meta.contiguous().view(dtype)
    return values.transpose(1, 2).reshape(-1, meta.shape[1])[:n].float()
