"""Rules of weight maps for checkpoints that order, join or nest their rows in other ways. They read no file of any format."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmdeploy.models.weights import Piece, Value, dense, take_rows

if TYPE_CHECKING:
    from lmdeploy.models.config import ModelConfig


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


def expert_rows(value: Value, expert: int, count: int) -> Value:
    """The rows of one of `count` experts, from [E, I, ...] or [E * I, ...]."""
    if value.shape[0] == count:
        rows = take_rows(value, slice(expert, expert + 1))
        return rows[0] if isinstance(rows, Tensor) else rows.flatten_rows()
    size = value.shape[0] // count
    return take_rows(value, slice(expert * size, (expert + 1) * size))
