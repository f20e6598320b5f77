"""From a model's own parameters back to its checkpoint's tensors. It knows the weight map, no arithmetic of quantization.

A weight map may stack, cut and reorder rows: what it does to row numbers tells how to undo it. A tensor whose values it
computes anew cannot be undone; such a tensor is kept as it is in the source.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmdeploy.layers.linear import Linear
from lmdeploy.lite.stream import LayerStream, layer_of
from lmdeploy.models.weights import Piece, Value, dense
from lmdeploy.quantization.packing import AffineTensor
from lmdeploy.quantization.scaled import ScaledTensor


@dataclass(frozen=True)
class Origin:
    """A tensor of the checkpoint and the parameter that its pieces fill."""

    name: str
    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]

    @property
    def parameter(self) -> str:
        return self.pieces[0].name

    @property
    def is_reversible(self) -> bool:
        return not any(piece.is_dense for piece in self.pieces) and len({piece.name for piece in self.pieces}) == 1


def layer_origins(stream: LayerStream, index: int) -> list[Origin]:
    """The tensors that fill layer `index`."""
    return [
        Origin(name, tuple(pieces), stream.source.infos[name].shape)
        for name, pieces in stream.plan.items()
        if layer_of(pieces[0].name) == index
    ]


def outside_layers(stream: LayerStream) -> Iterator[tuple[str, Tensor]]:
    """Every other tensor by name, one at a time, those that the engine skips included, but for stored rotary tables."""
    for name in stream.source.infos:
        pieces = stream.plan.get(name, [])
        if pieces and layer_of(pieces[0].name) is not None:
            continue
        if not name.endswith("inv_freq"):
            yield name, dense(stream.source.read(name))


def convertible_linears(
    origins: list[Origin], index: int, layer: nn.Module, fits: Callable[[tuple[int, ...]], bool]
) -> set[str]:
    """Paths of linears whose tensors can all be written quantized. fits: whether the format holds a weight of this shape."""
    kinds: dict[str, bool] = {}
    for origin in origins:
        path, leaf = path_of(origin, index)
        module = layer.get_submodule(path)
        if isinstance(module, Linear) and leaf == "weight":
            is_weight = origin.name.endswith(".weight")
            kinds[path] = kinds.get(path, True) and fits(origin.shape) and is_weight and origin.is_reversible
    return {path for path, is_convertible in kinds.items() if is_convertible}


def writable_modules(origins: list[Origin], index: int) -> set[str]:
    """Paths of modules all of whose tensors can be written back after their values changed."""
    paths = {path_of(origin, index)[0] for origin in origins}
    return paths - {path_of(origin, index)[0] for origin in origins if not origin.is_reversible}


def restored(
    origin: Origin, layer: nn.Module, index: int, quantized: Mapping[str, AffineTensor | ScaledTensor]
) -> Value:
    """The tensor's values out of the layer's parameters: of a quantized linear, in integers."""
    path, leaf = path_of(origin, index)
    module = layer.get_submodule(path)
    value: Value
    if isinstance(module, Linear) and leaf == "weight":
        value = quantized[path] if path in quantized else module.method.dense_weight(module)
    else:
        value = getattr(module, leaf).data
    rows = model_rows(origin, module)
    if isinstance(value, Tensor):
        return value.cpu()[rows].view(origin.shape)
    return value.rows(rows)


def path_of(origin: Origin, index: int) -> tuple[str, str]:
    """The module that the tensor belongs to, and which of its parameters it is."""
    path, _, leaf = origin.parameter.removeprefix(f"layers.{index}.").rpartition(".")
    return path, leaf


def model_rows(origin: Origin, module: nn.Module) -> Tensor:
    """For each row of the checkpoint's tensor, the row of the parameter that holds it."""
    lengths = origin.shape[:-1] if origin.pieces[0].name.endswith(".weight") and len(origin.shape) > 1 else origin.shape
    numbers = torch.arange(math.prod(lengths)).view(lengths)
    rows = torch.empty(numbers.numel(), dtype=torch.long)
    for piece in origin.pieces:
        sources = piece.value(numbers)
        assert isinstance(sources, Tensor)
        parts = module.parts if isinstance(module, Linear) else (sources.numel(),)
        start = 0 if piece.part is None else sum(parts[: piece.part])
        rows[sources.flatten()] = torch.arange(start, start + sources.numel())
    return rows


def without_numbers(name: str) -> str:
    """A module's name for all layers and experts at once: model.layers.*.mlp.gate."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
