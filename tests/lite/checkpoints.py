"""What the tests of quantized folders share: tiny models with text to calibrate on, and readers of their own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from lmdeploy.engine.client import ThreadClient
from lmdeploy.engine.config import EngineConfig
from lmdeploy.lite.quantize import quantize_model
from lmdeploy.lite.settings import Settings
from tests.golden import answer
from tests.goldens.materialize import materialize
from tests.tiny_model import make_tiny_llama, train_tokenizer

GOLDENS = Path(__file__).parent.parent / "goldens"
PROMPT = [5, 17, 40, 9, 100, 33]
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
    figures = quantize_model(model, Settings(output, str(text), **values), told.append)  # type: ignore[arg-type]
    return figures, told


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in float32; what AWQ, GPTQ or SmoothQuant hold of a linear X, read bit by bit, as X.weight."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored = load_file(folder / "model.safetensors")
    tensors = {}
    for name, value in stored.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            read = read_gptq if config["quant_method"] == "gptq" else read_awq
            tensors[f"{stem}.weight"] = read(stored, stem, config)
        elif leaf == "weight" and f"{stem}.scale" in stored:
            tensors[name] = value.float() * stored[f"{stem}.scale"]
        elif leaf not in ("qzeros", "scales", "g_idx", "scale"):
            tensors[name] = value.float()
    return tensors


def read_awq(stored: dict[str, torch.Tensor], stem: str, config: dict[str, int]) -> torch.Tensor:
    codes, zeros = unpack(stored[f"{stem}.qweight"]), unpack(stored[f"{stem}.qzeros"])
    group = torch.arange(len(codes)) // config["group_size"]
    return ((codes - zeros[group]) * stored[f"{stem}.scales"].float()[group]).t()


def read_gptq(stored: dict[str, torch.Tensor], stem: str, config: dict[str, int]) -> torch.Tensor:
    """The first version of the layout: a zero is stored less one."""
    bits, group = config["bits"], stored[f"{stem}.g_idx"].long()
    places = range(0, 32, bits)
    words, zero_words = stored[f"{stem}.qweight"].long(), stored[f"{stem}.qzeros"].long()
    codes = torch.stack([(words >> place) % 2**bits for place in places], dim=1).flatten(0, 1)
    zeros = torch.stack([(zero_words >> place) % 2**bits for place in places], dim=2).flatten(1) + 1
    return ((codes - zeros[group]) * stored[f"{stem}.scales"].float()[group]).t()


def unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, N / 8] -> float [R, N]."""
    codes = [(words.long() >> (4 * place)) & 15 for place in _NIBBLES]
    return torch.stack(codes, dim=-1).flatten(1).float()


def greedy(folder: Path, dtype: str = "float32") -> tuple[list[int], torch.Tensor]:
    """Six tokens of an answer, and the logits."""
    client = ThreadClient(folder, EngineConfig(dtype=dtype, device="cpu", session_len=64, cache_max_entry_count=8))
    try:
        return answer(client, PROMPT, 6)
    finally:
        client.close()


def logits_error(folder: Path, original: Path) -> float:
    """Distance of the quantized model's logits for the prompt, relative; what follows depends on the tokens chosen."""
    values, expected = (greedy(path)[1][: len(PROMPT)] for path in (folder, original))
    return ((values - expected).norm() / expected.norm()).item()


class FakeDatasets:
    """Stands for the `datasets` library: the records it gives, and what it was asked for."""

    def __init__(self, records: list[dict[str, object]]) -> None:
        self.records = records
        self.asked: list[dict[str, object]] = []

    def load_dataset(self, **options: object) -> list[dict[str, object]]:
        self.asked.append(options)
        return self.records
