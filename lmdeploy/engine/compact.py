"""Moves weights side by side in a GPU's memory, without the gaps that loading leaves. It knows no format of theirs.

torch's allocator lays tensors of 1 to 10 MiB into segments of 20 MiB and cuts what was freed into pieces:
https://github.com/pytorch/pytorch/blob/main/c10/cuda/CUDACachingAllocator.cpp
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from lmdeploy.layers.linear import Linear
from lmdeploy.models.base import CausalLM

_SMALL = 1 << 20  # up to which tensors share segments of 2 MiB
_AT_A_TIME = 256 << 20  # for what is being moved there are two places
_ALIGNMENT = 512


def close_gaps(model: CausalLM) -> None:
    """Move all but small weights; their tensors stay the same objects. What there is no room to move stays where it is."""
    large = [tensor for tensor in _tensors_with_own_memory(model) if tensor.nbytes > _SMALL]
    moved: list[Tensor] = []
    for tensor in sorted(large, key=Tensor.data_ptr):  # so that whole segments become free
        moved.append(tensor)
        if sum(t.nbytes for t in moved) >= _AT_A_TIME:
            _lay_side_by_side(moved)
            moved = []
    _lay_side_by_side(moved)


def _lay_side_by_side(tensors: list[Tensor]) -> None:
    if not tensors:
        return
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
    if tensors[0].is_cuda:
        torch.cuda.empty_cache()  # else what was freed before would be the place, with a gap behind it
    try:
        place = torch.empty(starts[-1], dtype=torch.uint8, device=tensors[0].device)
    except torch.OutOfMemoryError:
        return
    for tensor, start in zip(tensors, starts, strict=False):
        bytes_ = place[start : start + tensor.nbytes]
        tensor.data = bytes_.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _tensors_with_own_memory(model: CausalLM) -> list[Tensor]:
    """Weights of which nothing else is a view, and which are no view of anything."""
    tensors = list({id(tensor): tensor for tensor in _tensors(model)}.values())
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)
    return [
        tensor
        for tensor in tensors
        if users[tensor.untyped_storage().data_ptr()] == 1
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.nbytes
    ]


def _tensors(model: CausalLM) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, Linear):
            yield from _held_by(vars(module.method))


def _held_by(value: Any) -> Iterator[Tensor]:
    """The tensors in what a LinearMethod keeps: dataclasses of them, and collections."""
    if isinstance(value, Tensor):
        yield value
        return
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in fields(value)]
    for part in parts:
        yield from _held_by(part)
