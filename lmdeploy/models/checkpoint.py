"""Finds the weight files of a model and presents their content as logical tensors by name. It knows no model.

Whatever the format, a tensor is dense, affine or scaled; whatever the layout, one is in memory at a time; files are mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lmdeploy.errors import CheckpointError
from lmdeploy.local_file import refuse_pointer
from lmdeploy.models.weight_files import SafetensorsFile, TensorInfo, TensorSource
from lmdeploy.models.weights import Value

_DENSE = ("weight", "bias", "inv_freq")  # how tensors of unquantized checkpoints end
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class Checkpoint:
    """The tensors of one or more files."""

    def __init__(self, files: Iterable[TensorSource]) -> None:
        """Raises CheckpointError if two files hold tensors of one name."""
        self.infos: dict[str, TensorInfo] = {}
        self._sources: dict[str, TensorSource] = {}
        for file in files:
            for name, info in file.infos.items():
                if name in self.infos:
                    raise CheckpointError(f"tensor {name!r} is in {self._sources[name]} and in {file}; remove one")
                self.infos[name] = info
                self._sources[name] = file

    def read(self, name: str) -> Value:
        """The tensor; the caller holds the only reference to memory that is not a mapped file."""
        return self._sources[name].read(name)


def open_checkpoint(
    path: str | Path, quantization: Mapping[str, Any] | None = None, model_format: str | None = None
) -> TensorSource:
    """Open a folder of safetensors or pytorch_model files, or a GGUF file (its other splits with it).

    quantization, model_format: what config.json and the user say of the weights' format; the files themselves decide. Raises
    CheckpointError for missing, truncated or damaged files and for git-lfs pointers; reads headers only.
    """
    path = Path(path)
    files = weight_files(path)
    for file in files:
        refuse_pointer(file)
    checkpoint = Checkpoint(_opener(file)(file) for file in files)
    if not (quantization or model_format) and all(name.endswith(_DENSE) for name in checkpoint.infos):
        return checkpoint
    from lmdeploy.models.weight_formats import logical_tensors

    return logical_tensors(checkpoint, path.is_file(), quantization or {}, model_format)


def weight_files(path: Path) -> list[Path]:
    """The files to read, each tensor once: an indexed set before loose files, safetensors before pytorch_model."""
    if path.is_file():
        from lmdeploy.models.gguf_weights import split_files

        return split_files(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a model folder or a .gguf file")
    for index in _INDEXES:
        if (path / index).is_file():
            from lmdeploy.models.weight_index import indexed_files

            refuse_pointer(path / index)
            return indexed_files(path / index)
    for pattern in ("model.safetensors", "*.safetensors", "pytorch_model.bin", "pytorch_model*.bin"):
        found = sorted(file for file in path.glob(pattern) if not file.name.startswith(("consolidated", "adapter_")))
        if found:
            return found
    from lmdeploy.models.misfit import list_folder

    raise CheckpointError(
        f"{path} has no model*.safetensors and no pytorch_model*.bin (it has: {list_folder(path)}); download the weights, or "
        "convert them to safetensors"
    )


def _opener(file: Path) -> Callable[[Path], TensorSource]:
    if file.suffix == ".safetensors":
        return SafetensorsFile
    if file.suffix == ".bin":
        from lmdeploy.models.torch_file import TorchFile

        return TorchFile
    from lmdeploy.models.gguf_weights import GGUFFile

    return GGUFFile
