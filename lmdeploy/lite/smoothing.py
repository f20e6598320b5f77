"""SmoothQuant's recipe: magnitude moves from activations into weights, both then fit 8 bits. It runs no layer.

Source: https://arxiv.org/abs/2211.10438. What is judged is the product as the engine computes it: int8 weights times
activations that are rounded per token; 8-bit floats are weights only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lmdeploy.errors import CheckpointError
from lmdeploy.kernels.reference.w8a8 import quantize_tokens
from lmdeploy.layers.linear import Linear
from lmdeploy.lite.recipe import Rounded, Statistics
from lmdeploy.lite.scaling import ScaleGroup, Unit, normalized, some_rows
from lmdeploy.quantization.scaled import ScaledTensor

_EXPONENTS = tuple(step / 20 for step in range(4, 20))
_SMALLEST = 1e-5
_INT8_TOP = 127


@dataclass(frozen=True)
class SmoothRecipe:
    """quant_dtype: torch.int8 or an 8-bit float. searches: try exponents instead of one half. dtype: of the rest."""

    quant_dtype: torch.dtype
    searches: bool
    dtype: torch.dtype

    def find_scale(self, group: ScaleGroup, statistics: Statistics) -> Tensor | None:
        """The factors whose products err least; without a search the fixed ones, and only of what a norm writes."""
        if not self.searches:
            return None if isinstance(group.source, Linear) else _factors(group, statistics, 0.5)
        candidates = [None, *(_factors(group, statistics, exponent) for exponent in _EXPONENTS)]
        errors = [self._error(group, statistics, scale) for scale in candidates]
        return candidates[min(range(len(errors)), key=errors.__getitem__)]

    def round(self, unit: Unit, statistics: Statistics) -> Rounded:
        """One unit's weight, and how far its product is from the exact one on held-out tokens."""
        value = round_rows(unit.weight, self.quant_dtype)
        x = statistics.of(unit)[1].sample
        exact = F.linear(x, unit.weight)
        error = (self._product(x, value) - exact).square().sum().item()
        relative = error / max(exact.square().sum().item(), 1e-30)
        if not math.isfinite(relative):
            raise CheckpointError(
                f"{unit.path}: rounding gives no number; weights are damaged, or too large for 16 bits: try --dtype bfloat16"
            )
        return Rounded(value.to(torch.device("cpu")), relative, str(self.quant_dtype).removeprefix("torch."))

    def _error(self, group: ScaleGroup, statistics: Statistics, scale: Tensor | None) -> float:
        """Squared error of the units' products if their inputs are divided by the factors."""
        total = 0.0
        for unit in group.converted:
            weight, x = some_rows(unit.weight), statistics.of(unit)[0].sample
            exact = F.linear(x, weight)
            if scale is not None:
                columns = group.spread(scale)
                weight, x = weight * columns, x / columns
            total += (self._product(x, round_rows(weight, self.quant_dtype)) - exact).square().sum().item()
        return total

    def _product(self, x: Tensor, weight: ScaledTensor) -> Tensor:
        if self.quant_dtype == torch.int8:
            integers, scales = quantize_tokens(x)
            x = integers.float() * scales
        return F.linear(x, weight.dequantize(torch.float32))


def _factors(group: ScaleGroup, statistics: Statistics, exponent: float) -> Tensor:
    """max |x| ** a / max |w| ** (1 - a) for each source channel, evenly around 1."""
    units = group.converted
    activation = group.gather(statistics.fitted[units[0].key].largest).clamp(min=_SMALLEST)
    weight = torch.stack([unit.weight.abs().amax(0) for unit in units]).amax(0)
    return normalized(activation**exponent / group.gather(weight).clamp(min=_SMALLEST) ** (1 - exponent))


def round_rows(weight: Tensor, dtype: torch.dtype) -> ScaledTensor:
    """A weight [N, K] in int8 or an 8-bit float, each row scaled to the type's largest number."""
    is_integer = dtype == torch.int8
    top = _INT8_TOP if is_integer else torch.finfo(dtype).max
    scales = (weight.abs().amax(1, keepdim=True) / top).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = weight / scales
    q = scaled.round().to(torch.int8) if is_integer else scaled.clamp(-top, top).to(dtype)
    return ScaledTensor(q, scales, weight.shape[1])
