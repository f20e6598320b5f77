"""Affine-quantized tensors as they come out of a checkpoint, whatever its format. It knows no file and no kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_ELEMENTS_AT_A_TIME = 1 << 20  # dequantized at once: the float32 intermediate stays in the cache


@dataclass(frozen=True, eq=False)
class AffineTensor:
    """w = q * scale + minimum, with one scale and one minimum per group of adjacent input channels.

    q: uint8 [..., N, K], one value each, below 2 ** bits. scales, mins: float32 [..., N, G], group_size = K / G.
    bits: 4 or 8, the narrowest storage that holds q. columns: the input channel [K] that each column of q belongs to,
    where that is not its own number (GPTQ's act-order).
    """

    q: Tensor
    scales: Tensor
    mins: Tensor
    bits: int
    columns: Tensor | None = None

    @staticmethod
    def from_zeros(q: Tensor, scales: Tensor, zeros: Tensor, bits: int, columns: Tensor | None = None) -> AffineTensor:
        """w = (q - zero) * scale; zeros [..., N, G] of any dtype."""
        scales = scales.float().contiguous()
        return AffineTensor(q, scales, -zeros.float() * scales, bits, columns)

    def integer_zeros(self) -> Tensor:
        """The zeros of `from_zeros`, uint8 [..., N, G]. Raises ValueError where they are no integers below 2 ** bits."""
        zeros = torch.where(self.scales == 0, torch.zeros(()), torch.round(-self.mins / self.scales))
        fits = (zeros >= 0) & (zeros < 1 << self.bits)
        if not (fits.all() and torch.allclose(zeros * self.scales, -self.mins, rtol=1e-5, atol=0.0)):
            raise ValueError("minima that are no multiples of their scale have no integer zeros")
        return zeros.to(torch.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.q.shape)

    @property
    def group_size(self) -> int:
        """Input channels that share a scale."""
        return self.q.shape[-1] // self.scales.shape[-1]

    def rows(self, index: slice | Tensor) -> AffineTensor:
        """The given rows (entries of the first dimension)."""
        if isinstance(index, slice):
            return replace(self, q=self.q[index], scales=self.scales[index], mins=self.mins[index])
        q, scales, mins = (t.index_select(0, index) for t in (self.q, self.scales, self.mins))
        return replace(self, q=q, scales=scales, mins=mins)

    def flatten_rows(self) -> AffineTensor:
        """[E, I, K] as [E * I, K]; a matrix stays as it is."""
        q, scales, mins = (t.reshape(-1, t.shape[-1]) for t in (self.q, self.scales, self.mins))
        return replace(self, q=q, scales=scales, mins=mins)

    def to_bits(self, bits: int) -> AffineTensor:
        """The same values in wider storage."""
        if bits < self.bits:
            raise ValueError(f"{self.bits}-bit integers do not fit into {bits} bits")
        return replace(self, bits=bits)

    def to_group(self, group_size: int) -> AffineTensor:
        """The same values with finer groups: scales and minima are repeated."""
        repeats, rest = divmod(self.group_size, group_size)
        if rest:
            raise ValueError(f"groups of {self.group_size} cannot be cut into groups of {group_size}")
        if repeats == 1:
            return self
        scales, mins = (t.repeat_interleave(repeats, dim=-1) for t in (self.scales, self.mins))
        return replace(self, scales=scales, mins=mins)

    @staticmethod
    def stack(parts: Sequence[AffineTensor]) -> AffineTensor:
        """The rows of all parts, with the widest bits and the finest groups among them; no value changes."""
        columns = parts[0].columns
        if not all(same_columns(part, parts[0]) for part in parts):
            raise ValueError("parts whose columns are in different orders cannot be stacked")
        bits = max(part.bits for part in parts)
        group_size = math.gcd(*(part.group_size for part in parts))
        alike = [part.to_bits(bits).to_group(group_size) for part in parts]
        if len(alike) == 1:
            return alike[0]
        q, scales, mins = (torch.cat(ts) for ts in zip(*((p.q, p.scales, p.mins) for p in alike), strict=True))
        return AffineTensor(q, scales, mins, bits, columns)

    def to(self, device: torch.device) -> AffineTensor:
        """The tensor on another device."""
        columns = None if self.columns is None else self.columns.to(device)
        q, scales, mins = (t.to(device) for t in (self.q, self.scales, self.mins))
        return replace(self, q=q, scales=scales, mins=mins, columns=columns)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, computed in float32 and rounded to dtype once."""
        out = torch.empty(self.q.shape, dtype=dtype, device=self.q.device)
        self.dequantize_into(out)
        return out

    def dequantize_into(self, out: Tensor) -> None:
        """Write the weight, computed in float32, into out: contiguous, of the same shape, any float dtype and device."""
        flat, columns = self.flatten_rows(), self.q.shape[-1]
        target = out.view(-1, columns)
        step = max(1, _ELEMENTS_AT_A_TIME // columns)
        for start in range(0, len(target), step):
            rows = slice(start, start + step)
            wide = flat.q[rows].float().unflatten(-1, (-1, self.group_size))
            wide.mul_(flat.scales[rows, :, None]).add_(flat.mins[rows, :, None])
            values = wide.flatten(-2)
            if self.columns is None:
                target[rows] = values
            else:
                target[rows] = torch.empty_like(values).index_copy_(1, self.columns, values)


def same_columns(a: AffineTensor, b: AffineTensor) -> bool:
    """Whether the columns of both belong to the same input channels."""
    if a.columns is None or b.columns is None:
        return a.columns is b.columns
    return torch.equal(a.columns, b.columns)
