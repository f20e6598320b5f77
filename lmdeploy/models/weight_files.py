"""One safetensors file as a source of tensors. It knows neither folders nor models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmdeploy.errors import CheckpointError
from lmdeploy.models.weights import Value


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    kind: dense, affine4, affine8, or the type of 8-bit numbers with scales: float8_e4m3fn, float8_e5m2, int8. is_optional: may
    be left out if the model has no place for it.
    """

    shape: tuple[int, ...]
    kind: str = "dense"
    is_optional: bool = False


class TensorSource(Protocol):
    """Tensors by name, in the order in which reading them is fastest."""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Shape and kind of every tensor."""
        ...

    def read(self, name: str) -> Value:
        """One tensor, on the CPU."""
        ...


class SafetensorsFile:
    """A .safetensors file, mapped. https://huggingface.co/docs/safetensors"""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            file: Any = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is truncated or damaged ({error}); download it again") from error
        self._file = file
        self.infos = {name: TensorInfo(tuple(file.get_slice(name).get_shape())) for name in file.offset_keys()}

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)
