"""Quantizes one decoder layer: runs it beside the original, collects moments, scales, rounds. It reads and writes no file.

Two stages, attention and then the rest, so that the second is fitted to what the quantized first one gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lmdeploy.errors import CheckpointError
from lmdeploy.layers.context import ForwardContext
from lmdeploy.layers.linear import Linear
from lmdeploy.lite.moments import Key, Moments, Recorder, StopForward, install_recorder
from lmdeploy.lite.recipe import QuantizedWeight, Recipe, Rounded, Statistics, scale_groups
from lmdeploy.lite.scaling import Unit, find_groups
from lmdeploy.lite.stream import LayerStream, linears_of


@dataclass
class Hidden:
    """Hidden states [W, S, C] of all windows, in the original model and in the quantized one.

    The last num_held_out windows judge, the others are fitted to. batch_size: windows computed together.
    """

    original: Tensor
    quantized: Tensor
    num_held_out: int
    batch_size: int

    def spans(self) -> tuple[list[slice], list[slice]]:
        """The batches to fit to, and those to judge by."""
        return self._cut(0, self._split), self._cut(self._split, len(self.original))

    @property
    def _split(self) -> int:
        return len(self.original) - self.num_held_out

    def _cut(self, start: int, end: int) -> list[slice]:
        return [slice(i, min(i + self.batch_size, end)) for i in range(start, end, self.batch_size)]


@dataclass
class QuantizedLayer:
    """What became of a layer. weights: by path of the linear; errors: output error of each, relative, and how it was made."""

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    errors: dict[str, tuple[float, str]] = field(default_factory=dict)


class LayerRunner:
    """Runs layers of one stream over windows of one length; contexts are made once per number of windows."""

    def __init__(self, stream: LayerStream, length: int) -> None:
        self.stream = stream
        self.length = length
        self._contexts: dict[int, ForwardContext] = {}

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """[W, S, C] -> [W, S, C]."""
        count = len(hidden)
        if count not in self._contexts:
            self._contexts[count] = self.stream.context(count, self.length)
        return self.stream.run_layer(layer, hidden, self._contexts[count])


def quantize_layer(
    run: LayerRunner,
    original: nn.Module,
    layer: nn.Module,
    hidden: Hidden,
    recipe: Recipe,
    convertible: Callable[[str], bool],
    scalable: Callable[[str], bool],
) -> QuantizedLayer:
    """Quantize `layer`, a copy of `original`, in place, and move `hidden` behind it.

    convertible, scalable: whether the linear at a path can be written in few bits, and whether it can be written at all.
    """
    reference, recorder = install_recorder(original), install_recorder(layer)
    reference.is_reference = True
    recorder.pair_with(reference)
    round_parameters(layer, recipe.dtype, convertible)
    result = QuantizedLayer()
    outputs: list[Tensor] = []
    linears = linears_of(layer)
    for is_attention in (True, False):
        paths = [path for path in linears if path.startswith("self_attn.") == is_attention]
        statistics = _collect(run, original, layer, recorder, hidden, paths, None if is_attention else outputs)
        units = list(_units(linears, statistics.fitted, convertible))
        groups = find_groups(layer, (unit for unit in units if scalable(unit.path)), run.stream.config)
        scale_groups(groups, statistics, recipe)
        round_parameters(layer, recipe.dtype, convertible)
        rounded = {unit.key: _round(unit, statistics, recipe) for unit in units if unit.is_converted}
        _gather(rounded, result)
    for recording in (reference, recorder):
        recording.start(frozenset())
    move(run, original, layer, hidden, torch.cat(outputs))
    return result


def quantize_layer_blindly(layer: nn.Module, recipe: Recipe, convertible: Callable[[str], bool]) -> QuantizedLayer:
    """Quantize `layer` in place without any text: no scales, every input as important as any other."""
    round_parameters(layer, recipe.dtype, convertible)
    result = QuantizedLayer()
    for path, linear in linears_of(layer).items():
        if convertible(path):
            unit = Unit(path, linear, slice(0, linear.out_features), (path, None))
            uniform = Moments.uniform(linear.in_features, unit.weight.device)
            _gather({unit.key: _round(unit, Statistics({unit.key: uniform}, {}), recipe)}, result)
    return result


def move(
    run: LayerRunner, original: nn.Module, layer: nn.Module, hidden: Hidden, outputs: Tensor | None = None
) -> None:
    """Replace hidden states by those behind the layer; outputs: of the original, if they are known."""
    fitted, held_out = hidden.spans()
    for span in fitted + held_out:
        if outputs is None:
            hidden.original[span] = run(original, hidden.original[span])
        hidden.quantized[span] = run(layer, hidden.quantized[span])
    if outputs is not None:
        hidden.original.copy_(outputs)


def round_parameters(layer: nn.Module, dtype: torch.dtype, convertible: Callable[[str], bool]) -> None:
    """Give what stays unquantized the values that it will be stored with."""
    for path, module in layer.named_modules():
        is_converted = isinstance(module, Linear) and convertible(path)
        for name, parameter in module.named_parameters(recurse=False):
            if not (is_converted and name == "weight"):
                parameter.data.copy_(parameter.data.to(dtype))


def _collect(
    run: LayerRunner,
    original: nn.Module,
    layer: nn.Module,
    recorder: Recorder,
    hidden: Hidden,
    paths: list[str],
    outputs: list[Tensor] | None,
) -> Statistics:
    """Moments of the inputs of these linears. outputs: filled with the original's, which then runs to its end."""
    reference = recorder.pair
    assert reference is not None
    parts: list[dict[Key, Moments]] = []
    for spans in hidden.spans():
        for recording in (reference, recorder):
            recording.start(frozenset(paths))
        for span in spans:
            seen = [path for path in reference.seen if path in paths]
            recorder.last_wanted = seen[-1] if seen else None
            reference.last_wanted = None if outputs is not None else recorder.last_wanted
            with _may_stop():
                output = run(original, hidden.original[span])
                if outputs is not None:
                    outputs.append(output)
            with _may_stop():
                run(layer, hidden.quantized[span])
        parts.append(recorder.moments)
    return Statistics(*parts)


class _may_stop:
    """The run within may end early."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is StopForward


def _units(
    linears: dict[str, Linear], moments: dict[Key, Moments], convertible: Callable[[str], bool]
) -> Iterator[Unit]:
    """What is quantized on its own: whole linears, or the rows of each expert where experts read inputs of their own."""
    for path, expert in list(moments):
        linear = linears[path]
        if expert is None and any(other == path and index is not None for other, index in moments):
            count = len(linear.parts)
            size = linear.out_features // count
            for index in range(count):
                yield Unit(path, linear, slice(index * size, (index + 1) * size), (path, index), convertible(path))
        elif expert is None:
            yield Unit(path, linear, slice(0, linear.out_features), (path, None), convertible(path))


def _round(unit: Unit, statistics: Statistics, recipe: Recipe) -> Rounded:
    rounded = recipe.round(unit, statistics)
    # Exactly what will be read back, so that a resumed run sees the same hidden states.
    unit.weight.copy_(rounded.weight.dequantize(torch.float32))
    return rounded


def _gather(rounded: dict[Key, Rounded], result: QuantizedLayer) -> None:
    """Put the experts of a linear together again."""
    paths = dict.fromkeys(path for path, _ in rounded)
    for path in paths:
        parts = [value for (other, _), value in rounded.items() if other == path]
        weights = [part.weight for part in parts]
        result.weights[path] = type(weights[0]).stack(weights)  # type: ignore[arg-type]  # all are of one type
        error = sum(part.error for part in parts) / len(parts)
        result.errors[path] = error, parts[0].candidate


def check_finite(hidden: Tensor, index: int) -> None:
    """Raise CheckpointError if a layer gave anything but numbers."""
    if not torch.isfinite(hidden).all():
        raise CheckpointError(
            f"layer {index} gives NaN or infinity; the weights are damaged, or too large for 16 bits: try --dtype bfloat16"
        )


def check_sense(hidden: Hidden, index: int) -> None:
    """Raise CheckpointError if the quantized states tell less of the original ones than zeros would."""
    error = (hidden.quantized - hidden.original).norm()
    if error > hidden.original.norm():
        raise CheckpointError(
            f"layer {index}: what the quantized layers give has nothing to do with the original; try smaller groups or "
            "--search best"
        )
