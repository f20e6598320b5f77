"""The GGUF header reader against the gguf package: what it writes is read, what it reads is the same, damage is named."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lmdeploy.errors import CheckpointError
from lmdeploy.gguf_file import read_metadata, read_tensor_index

VALUES: dict[str, tuple[str, Any]] = {
    "test.text": ("add_string", "größe 你好"),
    "test.flag": ("add_bool", True),
    "test.int": ("add_int32", -7),
    "test.long": ("add_uint64", 1 << 40),
    "test.double": ("add_float64", 0.1),
    "test.texts": ("add_array", ["a", "", "é" * 300]),
    "test.numbers": ("add_array", [3, -1, 2]),
    "test.reals": ("add_array", [0.5, -2.0]),
    "test.flags": ("add_array", [True, False]),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, (method, value) in VALUES.items():
        getattr(writer, method)(key, value)
    writer.add_tensor("a.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("b.bias", np.ones(5, dtype=np.float16))
    quantized = gguf.quants.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("c.weight", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_comes_back_as_written(file: Path) -> None:
    metadata = read_metadata(file)
    assert metadata["general.architecture"] == "llama"
    assert {key: metadata[key] for key in VALUES} == {key: value for key, (_, value) in VALUES.items()}


def test_tensor_index_points_at_the_tensors_bytes(file: Path) -> None:
    index = {info.name: info for info in read_tensor_index(file)}
    assert {name: info.shape for name, info in index.items()} == {
        "a.weight": (3, 4),
        "b.bias": (5,),
        "c.weight": (2, 64),
    }
    data = file.read_bytes()
    a = index["a.weight"]
    values = np.frombuffer(data, np.float32, offset=a.offset_bytes, count=a.size_bytes // 4)
    np.testing.assert_array_equal(values.reshape(a.shape), np.arange(12).reshape(3, 4))
    assert index["c.weight"].ggml_type == gguf.GGMLQuantizationType.Q8_0
    assert index["c.weight"].size_bytes == 2 * 2 * 34


def test_the_builtin_model_reads_as_the_gguf_package_reads_it(builtin_model: Path) -> None:
    start = time.perf_counter()
    metadata = read_metadata(builtin_model)
    seconds = time.perf_counter() - start
    reader = gguf.GGUFReader(str(builtin_model))
    expected = [
        (t.name, tuple(reversed([int(n) for n in t.shape])), int(t.tensor_type), int(t.data_offset), int(t.n_bytes))
        for t in reader.tensors
    ]
    index = read_tensor_index(builtin_model)
    assert [(i.name, i.shape, i.ggml_type, i.offset_bytes, i.size_bytes) for i in index] == expected
    assert set(metadata) == {key for key in reader.fields if not key.startswith("GGUF.")}
    assert all(metadata[key] == reader.fields[key].contents() for key in metadata)
    assert seconds < 1


def test_every_truncation_is_one_clear_error(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    end = max(info.offset_bytes + info.size_bytes for info in read_tensor_index(file))
    for size in [*range(0, end, 7), end - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            read_tensor_index(cut)


def test_damaged_headers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    text = struct.pack("<Q", 1) + b"k"
    cases = {
        b"GGML" + bytes(20): "not a GGUF file",
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0): "version 1",
        header + text + struct.pack("<I", 99): "unknown type 99",
        header + text + struct.pack("<IIQ", 9, 8, 1 << 60): "truncated or damaged",
        header + struct.pack("<Q", 1 << 60): "truncated or damaged",
        header + text + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9: "unknown type 9",
    }
    for data, message in cases.items():
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            read_metadata(path)


def test_unknown_tensor_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "new.gguf"
    name = struct.pack("<Q", 1) + b"w"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + name + struct.pack("<IQIQ", 1, 32, 250, 0) + bytes(64))
    with pytest.raises(CheckpointError, match="GGML type 250"):
        read_tensor_index(path)
