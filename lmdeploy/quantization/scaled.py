"""Tensors of 8-bit floats or signed integers with scales, as they come out of a checkpoint. It knows no file and no kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmdeploy.errors import CheckpointError
from lmdeploy.kernels.reference.fp8 import dequantize_into


@dataclass(frozen=True, eq=False)
class ScaledTensor:
    """w = q * scale, with one scale per row and group of adjacent input channels.

    q: float8_e4m3fn, float8_e5m2 or int8 [N, K]. scales: float32 [N, G], G = ceil(K / group_size): the last group may be short.
    """

    q: Tensor
    scales: Tensor
    group_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.q.shape)

    def rows(self, index: slice | Tensor) -> ScaledTensor:
        """The given rows."""
        if isinstance(index, slice):
            return replace(self, q=self.q[index], scales=self.scales[index])
        # Through bytes: torch indexes no 8-bit floats.
        q = self.q.view(torch.uint8).index_select(0, index).view(self.q.dtype)
        return replace(self, q=q, scales=self.scales.index_select(0, index))

    def flatten_rows(self) -> ScaledTensor:
        """The tensor itself: it always is a matrix."""
        return self

    def to_group(self, group_size: int) -> ScaledTensor:
        """The same values with finer groups; group_size divides the present one."""
        repeats, rest = divmod(self.group_size, group_size)
        if rest:
            raise ValueError(f"groups of {self.group_size} cannot be cut into groups of {group_size}")
        scales = self.scales.repeat_interleave(repeats, dim=1)[:, : -(-self.q.shape[1] // group_size)]
        return replace(self, scales=scales, group_size=group_size)

    @staticmethod
    def stack(parts: Sequence[ScaledTensor]) -> ScaledTensor:
        """The rows of all parts, which must be of one type, with the finest groups among them; no value changes."""
        group_size = math.gcd(*(part.group_size for part in parts))
        alike = [part.to_group(group_size) for part in parts]
        q = torch.cat([part.q.view(torch.uint8) for part in alike]).view(alike[0].q.dtype)
        return ScaledTensor(q, torch.cat([part.scales for part in alike]), group_size)

    def to(self, device: torch.device) -> ScaledTensor:
        """The tensor on another device."""
        return replace(self, q=self.q.to(device), scales=self.scales.to(device))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight, computed in float32 and rounded to dtype once."""
        out = torch.empty(self.q.shape, dtype=dtype, device=self.q.device)
        self.dequantize_into(out)
        return out

    def dequantize_into(self, out: Tensor) -> None:
        """Write the weight, computed in float32, into out: of the same shape, any float dtype and device."""
        dequantize_into(out, self.q, self.scales, self.group_size)


def read_scaled(q: Tensor, scale: Tensor, block: tuple[int, int] = (128, 128)) -> ScaledTensor:
    """q [N, K] with one scale in all, one per row [N] or [N, 1], per row and group [N, G], or per block [N / b, K / c].

    block: (b, c), for scales that are per block. Raises CheckpointError if the scales do not cover the weight.
    """
    rows, columns = q.shape
    scale = scale.float()
    if scale.numel() == 1:
        return ScaledTensor(q, scale.reshape(1, 1).expand(rows, 1), columns)
    if scale.dim() == 1:
        scale = scale[:, None]
    if tuple(scale.shape) == (-(-rows // block[0]), -(-columns // block[1])):
        return ScaledTensor(q, scale.repeat_interleave(block[0], dim=0)[:rows], block[1])
    if scale.shape[0] == rows and scale.shape[1] > 0 and columns % scale.shape[1] == 0:
        return ScaledTensor(q, scale, columns // scale.shape[1])
    raise CheckpointError(
        f"scales {list(scale.shape)} do not cover a weight {rows} x {columns}, nor its blocks {block}"
    )
