"""The grids that weights are rounded to: integers, one scale and one zero point per group. It knows no calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.quantization.packing import AffineTensor

_TINY = 1e-7
_SHRINKS = tuple(1 - 0.04 * step for step in range(13))
_FEW_SHRINKS = (1.0, 0.9, 0.8, 0.7)
_ELEMENTS_AT_A_TIME = 1 << 21


@dataclass(frozen=True)
class GridSpec:
    """bits per weight, input channels per group, whether the zero point is fixed in the middle, dtype of the scales.

    min_zero: least zero point, for formats that cannot hold a zero of 0.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float16
    min_zero: int = 0

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1


@dataclass(frozen=True)
class Grid:
    """value = (code - zero) * scale. scale, zero: float32 [N, G], scale exact in the spec's dtype, zero a whole number."""

    scale: Tensor
    zero: Tensor
    spec: GridSpec

    @staticmethod
    def between(low: Tensor, high: Tensor, spec: GridSpec) -> Grid:
        """The grid whose codes span low to high [N, G]; zero itself is always a value."""
        if spec.symmetric:
            half = (spec.top - 1) // 2
            bound = torch.maximum(-low, high)
            scale = (bound / half).clamp(min=_TINY)
            scale = _storable(scale, spec)
            return Grid(scale, torch.full_like(scale, half + 1), spec)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _storable(((high - low) / spec.top).clamp(min=_TINY), spec)
        return Grid(scale, torch.round(-low / scale).clamp_(spec.min_zero, spec.top), spec)

    def round(self, weight: Tensor) -> Tensor:
        """Nearest codes of a weight [N, K], float32."""
        grouped = weight.unflatten(-1, (-1, self.spec.group_size))
        codes = grouped / self.scale[..., None]
        return codes.round_().add_(self.zero[..., None]).clamp_(0, self.spec.top).flatten(-2)

    def values(self, codes: Tensor) -> Tensor:
        """What the codes [N, K] stand for."""
        grouped = codes.unflatten(-1, (-1, self.spec.group_size))
        return ((grouped - self.zero[..., None]) * self.scale[..., None]).flatten(-2)

    def to_affine(self, codes: Tensor) -> AffineTensor:
        """The codes in the form that every reader and writer of this package shares, on the CPU."""
        q, scale, zero = codes.to(torch.uint8).cpu(), self.scale.cpu(), self.zero.cpu()
        return AffineTensor(q, scale, -zero * scale, self.spec.bits)


def group_range(weight: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group: [N, K] -> two of [N, G]."""
    low, high = weight.unflatten(-1, (-1, spec.group_size)).aminmax(dim=-1)
    return low, high


def plain_grid(weight: Tensor, spec: GridSpec) -> Grid:
    """The grid from each group's smallest to its largest weight."""
    return Grid.between(*group_range(weight, spec), spec)


def clipped_grid(weight: Tensor, importance: Tensor, spec: GridSpec) -> Grid:
    """For each group the shrunk range with the least error, squared and weighted by importance [K] (mean of x^2).

    First both ends shrink together, then each alone from there.
    """
    step = max(1, _ELEMENTS_AT_A_TIME // weight.shape[1])
    parts = [_clip_rows(rows, importance, spec) for rows in weight.split(step)]
    return Grid(torch.cat([p.scale for p in parts]), torch.cat([p.zero for p in parts]), spec)


def roughly_clipped_grid(weight: Tensor, importance: Tensor, spec: GridSpec) -> Grid:
    """As clipped_grid, with few tries and both ends shrunk alike: enough to compare scales by."""
    low, high = group_range(weight, spec)
    ranges = [(low * ratio, high * ratio) for ratio in _FEW_SHRINKS]
    return Grid.between(*_best_range(weight, importance, spec, ranges), spec)


def _clip_rows(weight: Tensor, importance: Tensor, spec: GridSpec) -> Grid:
    low, high = group_range(weight, spec)
    shrinks = [(ratio, ratio) for ratio in _SHRINKS]
    best = _best_range(weight, importance, spec, [(low * a, high * b) for a, b in shrinks])
    if not spec.symmetric:
        for _ in range(2):
            low, high = best
            lows = [(low * ratio, high) for ratio in (1.0, 0.92, 0.96, 1.04, 1.08)]
            low, high = _best_range(weight, importance, spec, lows)
            highs = [(low, high * ratio) for ratio in (1.0, 0.92, 0.96, 1.04, 1.08)]
            best = _best_range(weight, importance, spec, highs)
    return Grid.between(*best, spec)


def _best_range(
    weight: Tensor, importance: Tensor, spec: GridSpec, ranges: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Of several ranges, each two of [N, G], the best one of every group."""
    weighing = importance.view(-1, spec.group_size)
    best_low, best_high = ranges[0]
    best_error = torch.full_like(best_low, float("inf"))
    for low, high in ranges:
        grid = Grid.between(low, high, spec)
        difference = grid.values(grid.round(weight)).sub_(weight).square_().unflatten(-1, (-1, spec.group_size))
        error = torch.einsum("ngk,gk->ng", difference, weighing)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
    return best_low, best_high


def _storable(scale: Tensor, spec: GridSpec) -> Tensor:
    """The scale as it will be stored, so that codes are chosen for the values that are read back."""
    return scale.to(spec.scale_dtype).float().clamp(min=torch.finfo(torch.float16).tiny)
