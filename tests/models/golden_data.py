"""The golden folders: which there are, their tiny checkpoints, and what the original code answered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.goldens.materialize import materialize

ROOT = Path(__file__).parent.parent / "goldens"
VISION_KEYS = {"vision_config", "visual", "vision_config_tiny", "mm_vision_tower"}
NUM_PROMPTS = 3
NUM_TOKENS = 16


@dataclass(frozen=True)
class Golden:
    """One folder's prompts and the original model's answers to them."""

    prompts: list[list[int]]
    positions: list[Tensor]
    logits: list[Tensor]
    greedy: list[list[int]]


def text_folders() -> list[str]:
    """Names, like 'llama/llama3.1', of all folders of models without a vision tower."""
    configs = sorted(ROOT.glob("*/*/config.json"))
    return [f"{p.parent.parent.name}/{p.parent.name}" for p in configs if not VISION_KEYS & set(read_config(p.parent))]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder."""
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def read_golden(name: str) -> Golden:
    """The expected outputs of a text folder."""
    data = load_file(ROOT / name / "golden.safetensors")
    names = [f"p{i}" for i in range(NUM_PROMPTS)]
    return Golden(
        prompts=[data[f"{p}.input_ids"].tolist() for p in names],
        positions=[data.get(f"{p}.positions", torch.arange(data[f"{p}.input_ids"].numel())) for p in names],
        logits=[data[f"{p}.logits"] for p in names],
        greedy=[data.get(f"{p}.greedy_cached", data[f"{p}.greedy"]).tolist() for p in names],
    )


def make_checkpoint(name: str, out: Path) -> Path:
    """Materialize a folder's checkpoint into `out`."""
    return materialize(ROOT / name, out)
