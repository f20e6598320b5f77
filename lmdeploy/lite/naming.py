"""From a model's own parameters back to its checkpoint's tensors. It knows the weight map, no arithmetic of quantization.

A weight map may stack, cut and reorder rows: what it does to row numbers tells how to undo it. A tensor whose values it
computes anew cannot be undone; such a tensor is kept as it is in the source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmdeploy.layers.linear import Linear
from lmdeploy.lite.stream import LayerStream, layer_of
from lmdeploy.models.weights import Piece, dense
from lmdeploy.quantization.packing import AffineTensor

_PACKED_ROWS = 8  # of a 4-bit weight in one 32-bit word of the AWQ format


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


def convertible_linears(origins: list[Origin], index: int, layer: nn.Module, group_size: int) -> set[str]:
    """Paths of linears whose tensors can all be written as AWQ's triplets in groups of this size."""
    kinds: dict[str, bool] = {}
    for origin in origins:
        path, leaf = _path(origin, index)
        module = layer.get_submodule(path)
        if isinstance(module, Linear) and leaf == "weight":
            fits = len(origin.shape) == 2 and origin.shape[0] % _PACKED_ROWS == 0 and origin.shape[1] % group_size == 0
            is_weight = origin.name.endswith(".weight")
            kinds[path] = kinds.get(path, True) and fits and is_weight and origin.is_reversible
    return {path for path, fits in kinds.items() if fits}


def linear_paths(origins: list[Origin], index: int, layer: nn.Module) -> set[str]:
    """Paths of all linears of the layer."""
    paths = {_path(origin, index)[0] for origin in origins}
    return {path for path in paths if isinstance(layer.get_submodule(path), Linear)}


def writable_modules(origins: list[Origin], index: int) -> set[str]:
    """Paths of modules all of whose tensors can be written back after their values changed."""
    paths = {_path(origin, index)[0] for origin in origins}
    return paths - {_path(origin, index)[0] for origin in origins if not origin.is_reversible}


def restored(origin: Origin, layer: nn.Module, index: int, quantized: dict[str, AffineTensor]) -> Tensor | AffineTensor:
    """The tensor's values out of the layer's parameters: of a quantized linear, in integers."""
    path, leaf = _path(origin, index)
    module = layer.get_submodule(path)
    value: Tensor | AffineTensor
    if isinstance(module, Linear) and leaf == "weight":
        value = quantized[path] if path in quantized else module.method.dense_weight(module)
    else:
        value = getattr(module, leaf).data
    rows = _model_rows(origin, module)
    if isinstance(value, AffineTensor):
        return value.rows(rows)
    return value.cpu()[rows].view(origin.shape)


def _path(origin: Origin, index: int) -> tuple[str, str]:
    path, _, leaf = origin.parameter.removeprefix(f"layers.{index}.").rpartition(".")
    return path, leaf


def _model_rows(origin: Origin, module: nn.Module) -> Tensor:
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
