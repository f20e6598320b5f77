"""How the weights of one layer become integers by groups, under each of three searches. It runs no layer.

none: LMDeploy's default, a fixed exponent and plain rounding. awq: scales by grid search, then clipping, as in AWQ.
best: scales judged together with clipping, also for the output projection of shared heads; then GPTQ on the scaled weights,
towards what the original layer gives on the original inputs; of all candidates the one that errs least on held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from lmdeploy.errors import CheckpointError
from lmdeploy.lite.gptq import factors, gptq_round
from lmdeploy.lite.grids import Grid, GridSpec, clipped_grid, plain_grid
from lmdeploy.lite.moments import Key, Moments
from lmdeploy.lite.scaling import ScaleGroup, Unit, fixed_scale, output_error, searched_scale
from lmdeploy.quantization.packing import AffineTensor
from lmdeploy.quantization.scaled import ScaledTensor

QuantizedWeight: TypeAlias = AffineTensor | ScaledTensor
_COMPENSATIONS = (0.5, 1.0)
_NOT_CLIPPED = (".qkv_proj", ".qkv_a_proj", ".q_b_proj")  # queries and keys, which AWQ leaves


@dataclass(frozen=True)
class Rounded:
    """One unit's result. error: of the output, relative to the output; candidate: what it was made by."""

    weight: QuantizedWeight
    error: float
    candidate: str


@dataclass
class Statistics:
    """Moments of the tokens that weights are fitted to, and of those that candidates are judged by."""

    fitted: dict[Key, Moments]
    held_out: dict[Key, Moments]

    def of(self, unit: Unit) -> tuple[Moments, Moments]:
        """Both moments of a unit; no sums at all for an expert that no token was sent to."""
        empty = Moments.empty(unit.linear.in_features, unit.weight.device)
        fitted = self.fitted.setdefault(unit.key, empty)
        return fitted, self.held_out.get(unit.key, fitted)

    def divided(self, unit: Unit, columns: Tensor) -> None:
        """The unit's input has been divided by columns [K]."""
        for moments in (self.fitted, self.held_out):
            if unit.key in moments:
                moments[unit.key] = moments[unit.key].divided(columns)


class Recipe(Protocol):
    """How the linears of a layer are scaled and rounded. dtype: of what is not quantized."""

    @property
    def dtype(self) -> torch.dtype: ...

    def find_scale(self, group: ScaleGroup, statistics: Statistics) -> Tensor | None: ...

    def round(self, unit: Unit, statistics: Statistics) -> Rounded: ...


def scale_groups(groups: Iterable[ScaleGroup], statistics: Statistics, recipe: Recipe) -> None:
    """Find and fold the scales of all groups of which something is quantized."""
    for group in groups:
        if not group.converted:
            continue
        for unit in group.units:
            statistics.of(unit)
        scale = recipe.find_scale(group, statistics)
        if scale is not None:
            group.fold(scale)
            for unit in group.units:
                statistics.divided(unit, group.spread(scale))


@dataclass(frozen=True)
class AffineRecipe:
    """Integers by groups. search: none, awq or best."""

    spec: GridSpec
    search: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the scales, and of what is not quantized."""
        return self.spec.scale_dtype

    def find_scale(self, group: ScaleGroup, statistics: Statistics) -> Tensor | None:
        """The group's factors by the search; None where it folds nothing."""
        moments = statistics.fitted
        if self.search == "none":
            return fixed_scale(group, moments, self.spec)
        if self.search == "awq" and group.repeats is not None:
            return None
        is_best = self.search == "best"
        return searched_scale(group, moments, self.spec, with_weights=is_best, clip=is_best)

    def round(self, unit: Unit, statistics: Statistics) -> Rounded:
        """Round one unit's weight."""
        weight, (fitted, held_out) = unit.weight, statistics.of(unit)
        try:
            candidates = self._candidates(unit, fitted)
        except CheckpointError as error:
            raise CheckpointError(f"{unit.path}: {error}") from error
        drift = _drift(weight, held_out)
        errors = {
            name: _judged(grid.values(codes) - weight, held_out, drift) for name, (grid, codes) in candidates.items()
        }
        best = min(errors, key=errors.__getitem__)
        relative = errors[best] / max(output_error(weight, held_out.square), 1e-30)
        if not math.isfinite(relative):
            raise CheckpointError(
                f"{unit.path}: rounding gives no number; weights are damaged, or too large for 16 bits: try --dtype bfloat16"
            )
        grid, codes = candidates[best]
        return Rounded(grid.to_affine(codes), relative, best)

    def _candidates(self, unit: Unit, fitted: Moments) -> dict[str, tuple[Grid, Tensor]]:
        """Grids and codes by the way they were made."""
        weight, importance, spec = unit.weight, fitted.mean_square, self.spec
        if self.search == "none" or (self.search == "awq" and unit.path.endswith(_NOT_CLIPPED)):
            grid = plain_grid(weight, spec)
            return {"rtn": (grid, grid.round(weight))}
        grid = clipped_grid(weight, importance, spec)
        candidates = {"clip": (grid, grid.round(weight))}
        if self.search == "best":
            candidates["gptq"] = grid, gptq_round(weight, fitted.square, grid)
            change = compensation(weight, fitted)
            for share in _COMPENSATIONS if fitted.drift is not None else ():
                target = weight + share * change
                grid = clipped_grid(target, importance, spec)
                candidates[f"gptq+{share:g}"] = grid, gptq_round(target, fitted.square, grid)
        return candidates


def compensation(weight: Tensor, moments: Moments) -> Tensor:
    """The change of the weight [N, K] that best makes up for what the inputs and residuals have drifted."""
    drift = _drift(weight, moments)
    if drift is None:
        return torch.zeros_like(weight)
    return torch.cholesky_solve(drift.t(), factors(moments.square)[0]).t()


def _drift(weight: Tensor, moments: Moments) -> Tensor | None:
    """Sum over tokens of the output's drift times the input, [N, K]."""
    if moments.drift is None:
        return None
    drift = weight @ moments.drift
    return drift if moments.residual is None else drift + moments.residual


def _judged(difference: Tensor, moments: Moments, drift: Tensor | None) -> float:
    """Squared distance to the original output, less what no candidate can change, from a weight's difference [N, K]."""
    error = output_error(difference, moments.square)
    return error if drift is None else error - 2 * (difference * drift).sum().item()
