"""Fills a built model: which tensor goes where, whether all is there, and the filling itself. It knows no file format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lmdeploy.errors import CheckpointError
from lmdeploy.layers.linear import Linear
from lmdeploy.models.base import CausalLM
from lmdeploy.models.weight_files import TensorSource
from lmdeploy.models.weights import Piece, Value, WeightMap, dense, take_rows
from lmdeploy.quantization import choose_method


@dataclass
class Slot:
    """One parameter, or the weight of a linear. parts: rows of each part of a linear; filled: of the parts, in what order."""

    module: nn.Module
    leaf: str
    parts: tuple[int, ...] = (0,)
    sources: dict[int, str] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    num_filled: int = 0

    @property
    def is_linear_weight(self) -> bool:
        return isinstance(self.module, Linear) and self.leaf == "weight"


def fill(
    model: CausalLM, checkpoint: TensorSource, weight_map: WeightMap, device: torch.device, dtype: torch.dtype
) -> None:
    """Read every tensor once and put it where the weight map says.

    Raises CheckpointError, before anything is read, if a parameter would get no tensor or two, or a tensor no parameter, and
    later for a tensor of another shape than its parameter's.
    """
    slots = find_slots(model)
    plan = make_plan(model, checkpoint, weight_map, slots)
    for slot in slots.values():
        if isinstance(slot.module, Linear) and slot.is_linear_weight:
            slot.module.method = choose_method(slot.kinds, device, dtype)
    for name, pieces in plan.items():
        tensor = checkpoint.read(name)
        for piece in pieces:
            place(piece.value(tensor), name, piece, slots[piece.name], device, dtype)
        del tensor  # before the next one comes


def find_slots(model: nn.Module) -> dict[str, Slot]:
    """Everything that must be filled, by parameter name."""
    slots: dict[str, Slot] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, Linear):
            slots[f"{prefix}weight"] = Slot(module, "weight", module.parts)
        for leaf, _ in module.named_parameters(recurse=False):
            parts = module.parts if isinstance(module, Linear) else (0,)
            slots[prefix + leaf] = Slot(module, leaf, parts)
    return slots


def make_plan(
    model: CausalLM, checkpoint: TensorSource, weight_map: WeightMap, slots: dict[str, Slot]
) -> dict[str, list[Piece]]:
    """The pieces of every tensor that is not skipped; in the slots, which tensor fills which part.

    A model that ties its head to its embedding accepts a checkpoint that stores the head nevertheless.
    """
    plan: dict[str, list[Piece]] = {}
    unused = []
    for name, info in checkpoint.infos.items():
        pieces = weight_map.pieces(name, model.config)
        if model.config.tie_word_embeddings:
            pieces = [piece for piece in pieces if piece.name != "lm_head.weight"]
        if info.is_optional:
            pieces = [piece for piece in pieces if piece.name in slots]
        for piece in pieces:
            slot = slots.get(piece.name)
            if slot is None or (piece.part or 0) >= len(slot.parts):
                unused.append(name)
                continue
            slot.kinds.add("dense" if piece.is_dense else info.kind)
            for part in _parts(piece, slot):
                if part in slot.sources:
                    raise CheckpointError(f"tensors {slot.sources[part]!r} and {name!r} both fill {piece.name!r}")
                slot.sources[part] = name
        if pieces:
            plan[name] = pieces
    if unused or any(len(slot.sources) < len(slot.parts) for slot in slots.values()):
        from lmdeploy.models.misfit import describe_misfit

        raise CheckpointError(describe_misfit(slots, list(dict.fromkeys(unused))))
    return plan


def place(value: Value, name: str, piece: Piece, slot: Slot, device: torch.device, dtype: torch.dtype) -> None:
    """Put a value into its slot, and finish a linear's weight with its last part. name: of the tensor, for errors."""
    parts = list(_parts(piece, slot))
    module = slot.module
    if not isinstance(module, Linear):
        parameter = getattr(module, slot.leaf)
        _check_shape(value, tuple(parameter.shape), name, piece)
        materialize(slot, device, dtype).copy_(dense(value))
        return
    columns = (module.in_features,) if slot.is_linear_weight else ()
    _check_shape(value, (sum(slot.parts[part] for part in parts), *columns), name, piece)
    start = 0
    for part in parts:
        rows = take_rows(value, slice(start, start + slot.parts[part]))
        start += slot.parts[part]
        if slot.is_linear_weight:
            module.method.load(module, part, rows, device, dtype)
        else:
            first = sum(slot.parts[:part])
            materialize(slot, device, dtype)[first : first + slot.parts[part]] = dense(rows)
    slot.num_filled += len(parts)
    if slot.is_linear_weight and slot.num_filled == len(slot.parts):
        module.method.finish(module)


def _parts(piece: Piece, slot: Slot) -> Iterable[int]:
    return range(len(slot.parts)) if piece.part is None else (piece.part,)


def materialize(slot: Slot, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The parameter's memory, made at first use. A module may keep parameters in float32 by naming them."""
    parameter = getattr(slot.module, slot.leaf)
    if parameter.is_meta:
        kept = slot.leaf in getattr(slot.module, "float32_parameters", ())
        memory = torch.empty(parameter.shape, dtype=torch.float32 if kept else dtype, device=device)
        parameter = nn.Parameter(memory, requires_grad=False)
        setattr(slot.module, slot.leaf, parameter)
    return parameter.data


def _check_shape(value: Value, expected: tuple[int, ...], name: str, piece: Piece) -> None:
    if tuple(value.shape) != expected:
        part = "" if piece.part is None else f", part {piece.part}"
        raise CheckpointError(
            f"tensor {name!r} (parameter {piece.name}{part}) should have shape {list(expected)} and has {list(value.shape)}; "
            "config.json and the weights are of different models"
        )
