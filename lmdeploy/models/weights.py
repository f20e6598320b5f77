"""How a checkpoint's tensors become a model's parameters, as rules that a family declares. It reads no file of any format.

A rule sees a tensor's name, not its values: it changes the name, says which part of a fused linear the tensor is, or adds a
step that its value will go through, dense or quantized, weight or bias alike. Rules run in their order, each on what the ones
before it left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lmdeploy.models.config import ModelConfig
    from lmdeploy.quantization.packing import AffineTensor
    from lmdeploy.quantization.scaled import ScaledTensor

Value: TypeAlias = "Tensor | AffineTensor | ScaledTensor"
Step = Callable[[Value], Value]


@dataclass(frozen=True)
class Piece:
    """A tensor of the checkpoint, or some rows of it, on its way to a parameter.

    name: once all rules have run, the parameter's. part: which part of a fused linear it is; None: all its rows.
    is_dense: whether a step turns a quantized value into a dense one.
    """

    name: str
    part: int | None = None
    steps: tuple[Step, ...] = ()
    is_dense: bool = False

    def value(self, tensor: Value) -> Value:
        """What the parameter gets of the tensor that was read."""
        for step in self.steps:
            tensor = step(tensor)
        return tensor

    def then(self, step: Step, *, is_dense: bool = False) -> Piece:
        """The piece with one more step."""
        return replace(self, steps=(*self.steps, step), is_dense=self.is_dense or is_dense)


class Rule(Protocol):
    """One declaration of a weight map."""

    def apply(self, piece: Piece, config: ModelConfig) -> Sequence[Piece]:
        """What becomes of the piece: itself if the rule does not concern it, nothing if it is not wanted."""
        ...


class WeightMap:
    """The rules of a family, in order. A family that adds to another's writes WeightMap(..., *Other.weight_map.rules)."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules

    def pieces(self, name: str, config: ModelConfig) -> list[Piece]:
        """The pieces that one tensor of the checkpoint yields; none if it is skipped."""
        pieces = [Piece(name)]
        for rule in self.rules:
            pieces = [result for piece in pieces for result in rule.apply(piece, config)]
        return pieces


@dataclass(frozen=True)
class Rename:
    """Replace what the regular expression matches, as re.sub does."""

    pattern: str
    replacement: str

    def apply(self, piece: Piece, config: ModelConfig) -> Sequence[Piece]:
        return (replace(piece, name=re.sub(self.pattern, self.replacement, piece.name)),)


@dataclass(frozen=True)
class Skip:
    """Leave out tensors whose name the regular expression matches anywhere."""

    pattern: str

    def apply(self, piece: Piece, config: ModelConfig) -> Sequence[Piece]:
        return () if re.search(self.pattern, piece.name) else (piece,)


@dataclass(frozen=True)
class Stack:
    """Several modules are the parts of one fused linear, in order: Stack("attn.qkv", ("attn.q", "attn.k", "attn.v")).

    target and sources end the path of a module, at whole names; what follows (weight, bias) is kept.
    """

    target: str
    sources: tuple[str, ...]

    def apply(self, piece: Piece, config: ModelConfig) -> Sequence[Piece]:
        module, _, leaf = piece.name.rpartition(".")
        for part, source in enumerate(self.sources):
            if module == source or module.endswith("." + source):
                return (replace(piece, name=f"{module.removesuffix(source)}{self.target}.{leaf}", part=part),)
        return (piece,)


def take_rows(value: Value, rows: slice | Tensor) -> Value:
    """Rows of a dense or quantized tensor."""
    return value[rows] if isinstance(value, Tensor) else value.rows(rows)


def dense(value: Value) -> Tensor:
    """The values themselves; of a quantized tensor in float32."""
    return value if isinstance(value, Tensor) else value.dequantize(torch.float32)
