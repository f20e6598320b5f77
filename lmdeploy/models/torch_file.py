"""One pytorch_model.bin as a source of tensors. It knows neither folders nor models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmdeploy.errors import CheckpointError
from lmdeploy.models.weight_files import TensorInfo


class TorchFile:
    """A pytorch_model.bin, mapped, unless it is of the time before torch 1.6 and must be read whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        state = _load(path)
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} holds a {type(state).__name__} where a dict of tensors is expected")
        self._tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
        self.infos = {name: TensorInfo(tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def _load(path: Path) -> Any:
    """Tensors and plain containers only: nothing in the file is executed."""
    with open(path, "rb") as stream:
        is_zip = stream.read(2) == b"PK"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch documents none: RuntimeError, OSError, EOFError, UnpicklingError ...
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        if reason.startswith("Weights only load failed"):
            raise CheckpointError(
                f"{path} holds more than tensors; convert it to safetensors where you trust it"
            ) from error
        raise CheckpointError(f"{path} is truncated or damaged ({reason}); download it again") from error
