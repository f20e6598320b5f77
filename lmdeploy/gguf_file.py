"""Reads the header of a GGUF file: its key/value metadata and where each tensor lies. It knows neither models nor weights.

The `gguf` package's reader builds an array object per value, two seconds for a small model; this one takes tens of
milliseconds, which is what a first token within three seconds leaves for it.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdeploy.errors import CheckpointError

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT_BYTES = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 8
_MAX_ARRAY_DEPTH = 4


@dataclass(frozen=True)
class GGUFTensorInfo:
    """Where one tensor lies in the file.

    shape: numpy order, slowest dimension first, in elements. ggml_type: a `gguf.GGMLQuantizationType` number.
    offset_bytes counts from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset_bytes: int
    size_bytes: int


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The key/value pairs: numbers, bools, str, and lists of them.

    Raises CheckpointError for a file that is no GGUF, is truncated, or is of version 1 or big-endian.
    """
    return _with_cursor(path, lambda cursor: cursor.read_header()[1])


def read_tensor_index(path: str | os.PathLike[str]) -> list[GGUFTensorInfo]:
    """Name, shape, type and place of every tensor, in file order.

    Raises CheckpointError as read_metadata does, and for an unknown tensor type or a tensor beyond the file's end.
    """
    return _with_cursor(path, _read_index)


def _with_cursor(path: str | os.PathLike[str], read: Callable[[_Cursor], Any]) -> Any:
    path = Path(path)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read(_Cursor(data, path))
    except (OSError, ValueError) as error:  # ValueError: mmap of an empty file
        raise CheckpointError(f"{path} cannot be read as a GGUF file: {error}") from error
    except (struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); download it again") from error


def _read_index(cursor: _Cursor) -> list[GGUFTensorInfo]:
    tensor_count, metadata = cursor.read_header()
    raw = []
    for _ in range(tensor_count):
        name = cursor.read_string()
        rank = cursor.read_scalar("I")
        if rank > _MAX_DIMENSIONS:
            raise CheckpointError(f"{cursor.path}: tensor {name!r} has {rank} dimensions; the file is damaged")
        shape = tuple(reversed([cursor.read_scalar("Q") for _ in range(rank)]))
        raw.append((name, shape, cursor.read_scalar("I"), cursor.read_scalar("Q")))
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT_BYTES)
    start = -(-cursor.position // alignment) * alignment
    index = [
        GGUFTensorInfo(name, shape, kind, start + offset, _size_bytes(cursor.path, name, shape, kind))
        for name, shape, kind, offset in raw
    ]
    for info in index:
        if info.offset_bytes + info.size_bytes > len(cursor.data):
            raise CheckpointError(
                f"{cursor.path} has {len(cursor.data)} bytes, but tensor {info.name!r} ends at byte "
                f"{info.offset_bytes + info.size_bytes}; the download is incomplete, get the file again"
            )
    return index


def _size_bytes(path: Path, name: str, shape: tuple[int, ...], ggml_type: int) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
    except (ValueError, KeyError):
        raise CheckpointError(
            f"{path}: tensor {name!r} has GGML type {ggml_type}, unknown to the installed gguf package; update it"
        ) from None
    elements = 1
    for size in shape:
        elements *= size
    if shape and shape[-1] % block_elements:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {shape} does not divide into blocks of {block_elements}"
        )
    return elements // block_elements * block_bytes


class _Cursor:
    """A position in the mapped file, moved on by each read."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0

    def read_header(self) -> tuple[int, dict[str, Any]]:
        """Read from the file's start; returns the number of tensors and the metadata."""
        if self.data[:4] != _MAGIC:
            raise CheckpointError(f"{self.path} is not a GGUF file: it begins with {self.data[:4]!r}")
        self.position = 4
        version = self.read_scalar("I")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path} is GGUF version {version}; little-endian versions 2 and 3 can be read")
        tensor_count, pair_count = self.read_scalar("Q"), self.read_scalar("Q")
        metadata = {}
        for _ in range(pair_count):
            key = self.read_string()
            metadata[key] = self.read_value(self.read_scalar("I"))
        return tensor_count, metadata

    def read_scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.position)
        self.position += struct.calcsize("<" + code)
        return value

    def read_string(self) -> str:
        start = self.position + 8
        end = start + self.read_scalar("Q")
        if end > len(self.data):
            raise struct.error(f"a text of {end - start} bytes at byte {start} runs beyond the end")
        self.position = end
        return self.data[start:end].decode("utf-8")

    def read_value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.read_scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.read_string()
        if kind == _ARRAY and depth < _MAX_ARRAY_DEPTH:
            return self._read_array(depth)
        raise CheckpointError(f"{self.path}: metadata value of unknown type {kind}; the file is damaged")

    def _read_array(self, depth: int) -> list[Any]:
        kind, count = self.read_scalar("I"), self.read_scalar("Q")
        if count > len(self.data) - self.position:
            raise struct.error(f"an array of {count} values runs beyond the end")
        if kind == _STRING:
            return self._read_strings(count)
        if kind in _SCALARS:
            layout = f"<{count}{_SCALARS[kind]}"
            values = list(struct.unpack_from(layout, self.data, self.position))
            self.position += struct.calcsize(layout)
            return values
        return [self.read_value(kind, depth + 1) for _ in range(count)]

    def _read_strings(self, count: int) -> list[str]:
        # The hot loop of a vocabulary (hundreds of thousands of texts), hence without read_string.
        data, position, limit = self.data, self.position, len(self.data)
        read_length = struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            start = position + 8
            position = start + read_length(data, position)[0]
            if position > limit:
                raise struct.error(f"a text at byte {start} runs beyond the end")
            texts.append(str(data[start:position], "utf-8"))
        self.position = position
        return texts
