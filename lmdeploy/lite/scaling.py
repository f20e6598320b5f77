"""Moves magnitude between a linear's input channels and what writes them, without changing the layer's output.

It owns the groups of a layer that share an input, the folding, and the search for scales; it rounds only to judge.
Sources: AWQ, https://arxiv.org/abs/2306.00978; for the fixed exponent LMDeploy's `auto_awq`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmdeploy.layers.layer_norm import LayerNorm
from lmdeploy.layers.linear import Linear
from lmdeploy.layers.norm import RMSNorm
from lmdeploy.lite.grids import Grid, GridSpec, plain_grid, roughly_clipped_grid
from lmdeploy.lite.moments import Key, Moments
from lmdeploy.models.base import ScaleTable
from lmdeploy.models.config import ModelConfig

_SMALLEST = 1e-4
_JUDGED_ROWS = 256


@dataclass(frozen=True)
class Unit:
    """Rows of a linear that are quantized together, since they read one input.

    key: of their moments. is_converted: whether they will be rounded, or only scaled along with others.
    """

    path: str
    linear: Linear
    rows: slice
    key: Key
    is_converted: bool = True

    @property
    def weight(self) -> Tensor:
        """A view of the rows, [N, K]."""
        return self.linear.method.dense_weight(self.linear)[self.rows]


@dataclass(frozen=True)
class ScaleGroup:
    """Units that read one input, and its source: a norm, or rows of a linear that reach the input channel by channel.

    repeats: (kv heads, heads per kv head, head dim) where attention repeats the source's channels.
    """

    units: tuple[Unit, ...]
    source: RMSNorm | LayerNorm | Linear
    source_rows: slice | None = None
    repeats: tuple[int, int, int] | None = None
    router: nn.Parameter | None = None

    @property
    def converted(self) -> list[Unit]:
        """The units that scales are chosen for."""
        return [unit for unit in self.units if unit.is_converted]

    @property
    def source_size(self) -> int:
        """Channels that the source writes, which may be fewer than the units read."""
        size = self.units[0].linear.in_features
        return size if self.repeats is None else size // self.repeats[1]

    def spread(self, scale: Tensor) -> Tensor:
        """A factor for each source channel as a factor for each input channel."""
        if self.repeats is None:
            return scale
        kv_heads, repeats, dim = self.repeats
        return scale.view(kv_heads, 1, dim).expand(kv_heads, repeats, dim).reshape(-1)

    def gather(self, statistic: Tensor) -> Tensor:
        """The mean over the input channels that one source channel reaches."""
        if self.repeats is None:
            return statistic
        return statistic.view(self.repeats).mean(1).reshape(-1)

    def fold(self, scale: Tensor) -> None:
        """Multiply the units' columns and divide the source, by a factor [source_size] for each source channel."""
        columns = self.spread(scale)
        for unit in self.units:
            unit.weight.mul_(columns)
        if self.router is not None:
            self.router.data.mul_(columns)
        source = self.source
        if isinstance(source, RMSNorm):
            source.weight.data.copy_((source.weight.data + source.offset) / scale - source.offset)
            return
        if isinstance(source, LayerNorm):
            source.weight.data.div_(scale)
        else:
            source.method.dense_weight(source)[self.source_rows].div_(scale[:, None])
        if source.bias is not None:
            bias = source.bias.data
            (bias if self.source_rows is None else bias[self.source_rows]).div_(scale)


def find_groups(layer: nn.Module, units: Iterable[Unit], config: ModelConfig) -> list[ScaleGroup]:
    """The groups of a layer's own table whose linears are all among the units; paths that the layer lacks are left out."""
    by_path: dict[str, list[Unit]] = {}
    for unit in units:
        by_path.setdefault(unit.path, []).append(unit)
    modules = dict(layer.named_modules())
    groups: list[ScaleGroup] = []
    table: ScaleTable = getattr(layer, "awq_groups", ())
    for source_path, reader_paths in table:
        source = modules.get(source_path)
        readers = [path for path in reader_paths if path in modules]
        linears = [path for path in readers if isinstance(modules[path], Linear)]
        if (
            not isinstance(source, (RMSNorm, LayerNorm, Linear))
            or not linears
            or any(path not in by_path for path in linears)
        ):
            continue
        group_units = [unit for path in linears for unit in by_path[path]]
        if isinstance(source, Linear):
            groups += _linear_groups(source, group_units, config)
            continue
        routers = [modules[path].weight for path in readers if path not in linears]
        groups.append(ScaleGroup(tuple(group_units), source, router=routers[0] if routers else None))
    return groups


def _linear_groups(source: Linear, units: list[Unit], config: ModelConfig) -> list[ScaleGroup]:
    """Values to the output projection, or the ungated half to the down projection, of each expert its own."""
    reader = units[0].linear
    if len(source.parts) == 3:
        if config.clip_qkv is not None:
            return []
        rows = slice(source.out_features - source.parts[2], source.out_features)
        heads, kv_heads = config.num_heads, config.num_kv_heads
        repeats = None if heads == kv_heads else (kv_heads, heads // kv_heads, config.head_dim)
        return [ScaleGroup((units[0],), source, rows, repeats)]
    if config.moe is not None and config.moe.clamp is not None:
        return []
    size = reader.in_features
    return [
        ScaleGroup((unit,), source, slice((2 * index + 1) * size, (2 * index + 2) * size))
        for index, unit in enumerate(units)
    ]


def normalized(scale: Tensor) -> Tensor:
    """Positive factors whose extremes lie evenly around 1."""
    scale = scale.clamp(min=_SMALLEST)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return torch.where(torch.isfinite(scale), scale, torch.ones_like(scale))


def fixed_scale(group: ScaleGroup, moments: dict[Key, Moments], spec: GridSpec) -> Tensor | None:
    """LMDeploy's default: largest |x| and mean share of |w| in its group's largest, both to the power of one half.

    None where it folds nothing: heads that share their values.
    """
    if group.repeats is not None:
        return None
    activation = moments[group.converted[0].key].largest
    weight = _weight_share(torch.cat([unit.weight for unit in group.converted]), spec)
    return normalized(activation.clamp(min=_SMALLEST).sqrt() / weight.clamp(min=_SMALLEST).sqrt())


def _weight_share(weight: Tensor, spec: GridSpec) -> Tensor:
    """Mean over rows of |w| in the group's largest |w|, [K]."""
    grouped = weight.abs().unflatten(-1, (-1, spec.group_size))
    return (grouped / grouped.amax(-1, keepdim=True).clamp(min=_SMALLEST)).flatten(-2).mean(0)


def searched_scale(
    group: ScaleGroup, moments: dict[Key, Moments], spec: GridSpec, *, with_weights: bool, clip: bool
) -> Tensor:
    """The factors, x^a or with weights also x^a / w^(1-a), whose rounding errs least in the units' outputs.

    clip: judge by the clipped grid, which is what the weights will be rounded to.
    """
    units = group.converted
    read = moments[units[0].key]
    activation = group.gather(read.absolute / max(read.count, 1)).clamp(min=_SMALLEST)
    share = group.gather(_weight_share(torch.cat([unit.weight for unit in units]), spec)).clamp(min=_SMALLEST)
    candidates = [normalized(activation ** (step / 20)) for step in range(20)]
    if with_weights:
        candidates += [normalized(activation ** (step / 10) / share ** (1 - step / 10)) for step in range(1, 10)]
    grid: Callable[[Tensor, Tensor, GridSpec], Grid] = roughly_clipped_grid if clip else _unclipped
    sampled = [some_rows(unit.weight) for unit in units]
    errors = [
        sum(
            _scaled_error(weight, moments[unit.key], group.spread(scale), spec, grid)
            for unit, weight in zip(units, sampled, strict=True)
        )
        for scale in candidates
    ]
    return candidates[min(range(len(errors)), key=errors.__getitem__)]


def _unclipped(weight: Tensor, importance: Tensor, spec: GridSpec) -> Grid:
    return plain_grid(weight, spec)


def some_rows(weight: Tensor) -> Tensor:
    """At most _JUDGED_ROWS rows, evenly spread."""
    step = max(1, len(weight) // _JUDGED_ROWS)
    return weight[::step]


def _scaled_error(
    weight: Tensor, moments: Moments, columns: Tensor, spec: GridSpec, make_grid: Callable[..., Grid]
) -> float:
    """Squared error of the output if the weight is rounded with its columns multiplied, per row."""
    scaled = weight * columns
    grid = make_grid(scaled, moments.mean_square / columns.square(), spec)
    return output_error((grid.values(grid.round(scaled)) - scaled) / columns, moments.square)


def output_error(difference: Tensor, square: Tensor) -> float:
    """Sum over tokens and rows of the squared output of a weight difference [N, K], under the second moment [K, K]."""
    return ((difference @ square) * difference).sum().item()
