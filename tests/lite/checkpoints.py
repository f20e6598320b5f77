"""What the tests of quantized folders share: tiny models with text to calibrate on, and an AWQ reader of their own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from lmdeploy.lite.auto_awq import Settings, auto_awq
from tests.goldens.materialize import materialize
from tests.tiny_model import make_tiny_llama, train_tokenizer

GOLDENS = Path(__file__).parent.parent / "goldens"
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # place of each of eight neighbours in a 32-bit word


def write_text(folder: Path) -> Path:
    """A file with some thousand tokens of text."""
    words = [f"word{i * 7919 % 613} and {i * 104729 % 997}, then the river" for i in range(900)]
    file = folder / "calib.txt"
    file.write_text(". ".join(words), encoding="utf-8")
    return file


def make_llama(folder: Path) -> Path:
    return make_tiny_llama(folder, hidden_size=128, intermediate_size=192, num_hidden_layers=3)


def make_golden(name: str, folder: Path) -> Path:
    """A golden folder's checkpoint with a tokenizer."""
    materialize(GOLDENS / name, folder)
    train_tokenizer(300).save(str(folder / "tokenizer.json"))
    return folder


def quantize(model: Path, output: Path, text: Path, **settings: object) -> tuple[dict[str, object], list[str]]:
    """Quantize quickly; the figures and what was told."""
    told: list[str] = []
    values = {"calib_samples": 10, "calib_seqlen": 48, "w_group_size": 32, "samples": False, **settings}
    figures = auto_awq(model, Settings(output, str(text), **values), told.append)  # type: ignore[arg-type]
    return figures, told


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors; AWQ triplets X.qweight, X.qzeros, X.scales dequantized to X.weight in float32, read bit by bit."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored = load_file(folder / "model.safetensors")
    tensors = {}
    for name, value in stored.items():
        if name.endswith(".qweight"):
            stem = name.removesuffix(".qweight")
            codes, zeros = unpack(value), unpack(stored[f"{stem}.qzeros"])
            group = torch.arange(len(codes)) // config["group_size"]
            tensors[f"{stem}.weight"] = ((codes - zeros[group]) * stored[f"{stem}.scales"].float()[group]).t()
        elif not name.endswith((".qzeros", ".scales")):
            tensors[name] = value.float()
    return tensors


def unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, N / 8] -> float [R, N]."""
    codes = [(words.long() >> (4 * place)) & 15 for place in _NIBBLES]
    return torch.stack(codes, dim=-1).flatten(1).float()
