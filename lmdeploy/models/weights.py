"""How a checkpoint's tensors become a model's parameters, as rules that a family declares. It reads no file of any format.

A rule sees a tensor's name, not its values: it changes the name, says which part of a fused linear the tensor is, or adds a
step that its value will go through, dense or quantized, weight or bias alike. Rules run in their order, each on what the ones
before it left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lmdeploy.quantization.packing import AffineTensor

if TYPE_CHECKING:
    from lmdeploy.models.config import ModelConfig

Value = Tensor | AffineTensor
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


@dataclass(frozen=True)
class Rows:
    """Put the rows of weights and biases in another order: order(config, number of rows) -> index of each new row's source."""

    pattern: str
    order: Callable[[ModelConfig, int], Tensor]

    def apply(self, piece: Piece, config: ModelConfig) -> Sequence[Piece]:
        if not re.search(self.pattern, piece.name):
            return (piece,)
        return (piece.then(lambda value: take_rows(value, self.order(config, value.shape[0]))),)


@dataclass(frozen=True)
class Split:
    """Cut one tensor into consecutive rows of several: the pattern's match is replaced by each target in turn."""

    pattern: str
    targets: tuple[str, ...]
    sizes: Callable[[ModelConfig], Sequence[int]]

    def apply(self, piece: Piece, config: ModelConfig) -> Sequence[Piece]:
        if not re.search(self.pattern, piece.name):
            return (piece,)
        pieces, start = [], 0
        for target, size in zip(self.targets, self.sizes(config), strict=True):
            rows = slice(start, start + size)
            named = replace(piece, name=re.sub(self.pattern, target, piece.name))
            pieces.append(named.then(lambda value, rows=rows: take_rows(value, rows)))  # type: ignore[misc]
            start += size
        return pieces


@dataclass(frozen=True)
class Transform:
    """Compute the values anew: function(dense tensor, config) -> tensor. Quantized values are dequantized for it."""

    pattern: str
    function: Callable[[Tensor, ModelConfig], Tensor]

    def apply(self, piece: Piece, config: ModelConfig) -> Sequence[Piece]:
        if not re.search(self.pattern, piece.name):
            return (piece,)
        return (piece.then(lambda value: self.function(dense(value), config), is_dense=True),)


@dataclass(frozen=True)
class Experts:
    """Modules source.E.{gate, up, down} of expert E are parts 2 E and 2 E + 1 of target.gate_up_proj and E of target.down_proj.

    source: regular expression; target: its replacement.
    """

    source: str
    target: str
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def apply(self, piece: Piece, config: ModelConfig) -> Sequence[Piece]:
        names = "|".join(re.escape(name) for name in (self.gate, self.up, self.down))
        match = re.search(rf"\.(\d+)\.({names})(?=\.[^.]+$)", piece.name)
        if match is None or not re.search(rf"(?:{self.source})$", piece.name[: match.start()]):
            return (piece,)
        owner = re.sub(rf"(?:{self.source})$", self.target, piece.name[: match.start()])
        expert, name = int(match[1]), match[2]
        if name == self.down:
            module, part = "down_proj", expert
        else:
            module, part = "gate_up_proj", 2 * expert + (name == self.up)
        return (replace(piece, name=f"{owner}.{module}{piece.name[match.end() :]}", part=part),)


@dataclass(frozen=True)
class ExpertRows:
    """One tensor holds a projection of all E experts, [E, I, K] or [E * I, K]: rows of expert e are part e * slots + slot.

    pattern and target as in Rename. For biases the shape is [E, I] or [E * I].
    """

    pattern: str
    target: str
    slot: int = 0
    slots: int = 1

    def apply(self, piece: Piece, config: ModelConfig) -> Sequence[Piece]:
        if not re.search(self.pattern, piece.name) or config.moe is None:
            return (piece,)
        named = replace(piece, name=re.sub(self.pattern, self.target, piece.name))
        count = config.moe.num_experts
        return [
            replace(
                named.then(lambda value, expert=expert: expert_rows(value, expert, count)),  # type: ignore[misc]
                part=expert * self.slots + self.slot,
            )
            for expert in range(count)
        ]


def grouped_qkv(config: ModelConfig, num_rows: int) -> Tensor:
    """Row order q | k | v of a tensor whose rows are grouped per KV head: its query heads, its key, its value.

    With one KV head this is q | k | v already; with as many KV heads as heads it is q, k, v of each head in turn.
    """
    kv_heads = config.num_kv_heads
    rows = torch.arange(num_rows).view(kv_heads, config.num_heads // kv_heads + 2, -1)
    return torch.cat((rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()))


def halves_from_pairs(config: ModelConfig, num_rows: int) -> Tensor:
    """Row order 0, 2, 4, ..., 1, 3, 5, ... of each head: rows stored for rotating neighbours as rotating halves needs them."""
    return torch.arange(num_rows).view(-1, config.head_dim // 2, 2).transpose(1, 2).flatten()


def take_rows(value: Value, rows: slice | Tensor) -> Value:
    """Rows of a dense or quantized tensor."""
    return value.rows(rows) if isinstance(value, AffineTensor) else value[rows]


def expert_rows(value: Value, expert: int, count: int) -> Value:
    """The rows of one of `count` experts, from [E, I, ...] or [E * I, ...]."""
    if value.shape[0] == count:
        rows = take_rows(value, slice(expert, expert + 1))
        return rows.flatten_rows() if isinstance(rows, AffineTensor) else rows[0]
    size = value.shape[0] // count
    return take_rows(value, slice(expert * size, (expert + 1) * size))


def dense(value: Value) -> Tensor:
    """The values themselves; of a quantized tensor in float32."""
    return value.dequantize(torch.float32) if isinstance(value, AffineTensor) else value
