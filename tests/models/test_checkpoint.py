"""Weight files of every layout, whole and broken: what is read, and that every defect is one clear CheckpointError."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import save_file

from lmdeploy.errors import CheckpointError
from lmdeploy.models.checkpoint import open_checkpoint, weight_files
from lmdeploy.models.mxfp4_weights import dequantize_mxfp4
from lmdeploy.models.weight_files import TensorInfo
from lmdeploy.quantization.packing import AffineTensor
from tests.quantization.affine_data import random_blocks

TENSORS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "b.weight": torch.arange(4.0).bfloat16(),
    "c.bias": torch.full((3,), 0.5, dtype=torch.float16),
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"


def check_content(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = open_checkpoint(path)
    assert {name: info.shape for name, info in checkpoint.infos.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert {info.kind for info in checkpoint.infos.values()} == {"dense"}
    for name, expected in tensors.items():
        value = checkpoint.read(name)
        assert isinstance(value, torch.Tensor)
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)


def write_shards(folder: Path, suffix: str = "safetensors", first: str = "model") -> None:
    """Three shards and their index."""
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items(), 1):
        file = f"{first}-{number:05}-of-00003.{suffix}"
        if suffix == "bin":
            torch.save({name: tensor}, folder / file)
        else:
            save_file({name: tensor}, folder / file)
        weight_map[name] = file
    (folder / f"{first}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_one_safetensors_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    check_content(tmp_path, TENSORS)


def test_safetensors_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    check_content(tmp_path, TENSORS)


def test_safetensors_shards_without_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    check_content(tmp_path, TENSORS)


@pytest.mark.parametrize("is_zip", [True, False])
def test_one_bin_file(tmp_path: Path, is_zip: bool) -> None:
    torch.save({**TENSORS, "step": 3}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    check_content(tmp_path, TENSORS)


def test_bin_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, "bin", "pytorch_model")
    check_content(tmp_path, TENSORS)


def test_indexed_safetensors_win_over_copies(tmp_path: Path) -> None:
    write_shards(tmp_path)
    wrong = {name: tensor + 1 for name, tensor in TENSORS.items()}
    save_file(wrong, tmp_path / "consolidated.safetensors")
    save_file(wrong, tmp_path / "adapter_model.safetensors")
    torch.save(wrong, tmp_path / "pytorch_model.bin")
    torch.save(wrong, tmp_path / "consolidated.00.pth")
    check_content(tmp_path, TENSORS)
    (tmp_path / "model.safetensors.index.json").unlink()
    check_content(tmp_path, TENSORS)


def test_one_name_in_two_files(tmp_path: Path) -> None:
    for letter in "ab":
        save_file(TENSORS, tmp_path / f"model-{letter}.safetensors")
    with pytest.raises(CheckpointError, match=r"'a.weight' is in .*model-a.safetensors and in .*model-b.safetensors"):
        open_checkpoint(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"3 files, and 1 of them are missing: model-00002-of-00003.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": [1]}', '{"metadata": {}}'])
def test_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is no index"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_names_no_file_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "model.gguf", "model.safetensors.index.json"]
)
def test_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(tmp_path / name if name.endswith("gguf") else tmp_path)


def test_empty_folder_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it has: nothing"):
        open_checkpoint(tmp_path)
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no model\*\.safetensors .*it has: consolidated.00.pth"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "no")


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf"])
def test_truncated_file(tmp_path: Path, name: str, kept: int) -> None:
    path = tmp_path / name
    if name.endswith("gguf"):
        write_gguf(path, {"a": ("F32", np.zeros((4, 32), dtype=np.float32))})
    elif name.endswith("bin"):
        torch.save(TENSORS, path)
    else:
        save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(path if name.endswith("gguf") else tmp_path)


def test_a_bin_file_with_other_objects_is_refused(tmp_path: Path) -> None:
    torch.save({"a": Namespace(x=1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors; convert it to safetensors"):
        open_checkpoint(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds a list"):
        open_checkpoint(tmp_path)


def write_gguf(path: Path, tensors: dict[str, tuple[str, np.ndarray]], architecture: str = "llama") -> None:
    """A GGUF file as the gguf package writes it; quantized tensors as bytes [rows, bytes per row]."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file(tmp_path: Path) -> None:
    plain = np.arange(64, dtype=np.float32).reshape(2, 32)
    tensors = {
        "norm": ("F32", np.arange(3, dtype=np.float32)),
        "half": ("F16", plain.astype(np.float16)),
        "four": ("Q4_1", random_blocks("Q4_1", 4, 64)),
        "eight": ("Q6_K", random_blocks("Q6_K", 2, 256)),
        "table": ("IQ4_NL", random_blocks("Q4_0", 2, 64)),  # the same 18 bytes per block, a scale and 32 codes
    }
    write_gguf(tmp_path / "m.gguf", tensors)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.infos == {
        "norm": TensorInfo((3,)),
        "half": TensorInfo((2, 32)),
        "four": TensorInfo((4, 64), "affine4"),
        "eight": TensorInfo((2, 256), "affine8"),
        "table": TensorInfo((2, 64)),
    }
    assert torch.equal(checkpoint.read("norm"), torch.arange(3.0))
    assert torch.equal(checkpoint.read("half"), torch.from_numpy(plain).half())
    for name in ("four", "eight", "table"):
        value = checkpoint.read(name)
        values = value.dequantize(torch.float32) if isinstance(value, AffineTensor) else value
        kind, data = tensors[name]
        assert torch.equal(values, torch.from_numpy(dequantize(data, GGMLQuantizationType[kind])))


def test_split_gguf(tmp_path: Path) -> None:
    files = [tmp_path / f"m-{number:05}-of-00002.gguf" for number in (1, 2)]
    for file, name in zip(files, "ab", strict=True):
        write_gguf(file, {name: ("F32", np.ones((1, 4), dtype=np.float32))})
    assert weight_files(files[1]) == files
    assert list(open_checkpoint(files[0]).infos) == ["a", "b"]
    files[1].unlink()
    with pytest.raises(CheckpointError, match=r"missing: m-00002-of-00002.gguf"):
        open_checkpoint(files[0])


def test_mxfp4_pairs_become_dense_tensors(tmp_path: Path) -> None:
    blocks = torch.zeros(2, 3, 2, 16, dtype=torch.uint8)
    blocks[1, 2, 1, 0] = 0xA3  # even channel: code 3 = 1.5, odd channel: code 10 = -1
    scales = torch.full((2, 3, 2), 127, dtype=torch.uint8)
    scales[1, 2, 1] = 129
    tensors = {"w_blocks": blocks, "w_scales": scales, "w_bias": torch.ones(2, 3), "other_scales": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert {name: info.shape for name, info in checkpoint.infos.items()} == {
        "w": (2, 64, 3),
        "w_bias": (2, 3),
        "other_scales": (2,),
    }
    expected = torch.zeros(2, 64, 3)
    expected[1, 32, 2], expected[1, 33, 2] = 6.0, -4.0
    value = checkpoint.read("w")
    assert isinstance(value, torch.Tensor)
    assert torch.equal(value.float(), expected)


def test_mxfp4_codes_and_exponents() -> None:
    """Every code under every exponent, against the definition: (-1)^s * {0, .5, 1, 1.5, 2, 3, 4, 6} * 2^(e - 127)."""
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    codes = torch.arange(16)
    blocks = (codes | codes << 4).to(torch.uint8).expand(1, 200, 1, 16)
    exponents = torch.arange(20, 220)
    values = dequantize_mxfp4(blocks, exponents.to(torch.uint8).view(1, 200, 1)).double()
    expected = torch.cat((magnitudes, -magnitudes)) * torch.exp2(exponents.double() - 127)[:, None]
    assert torch.equal(values[0], expected.repeat_interleave(2, dim=1))
