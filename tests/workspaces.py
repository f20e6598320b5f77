"""What the tests of workspaces share: tiny models converted, edits of config.ini, and greedy answers."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lmdeploy.engine.client import ThreadClient
from lmdeploy.engine.config import EngineConfig
from lmdeploy.lite.convert import ConvertSettings, convert
from lmdeploy.workspace import CONFIG, WEIGHTS
from tests.golden import answer

PROMPT = [5, 17, 40, 9, 100, 33]


def make_workspace(source: Path, output: Path, name: str = "internlm2", **settings: object) -> Path:
    """Convert in silence; the workspace's path."""
    return convert(source, ConvertSettings(name, output, **settings), lambda text: None)  # type: ignore[arg-type]


def edit(workspace: Path, **values: object) -> Path:
    """Give keys of config.ini other values, adding what is not there; the folder of weights."""
    file = workspace / WEIGHTS / CONFIG
    text = file.read_text(encoding="utf-8")
    for key, value in values.items():
        line = f"{key} = {value}"
        text, count = re.subn(rf"^{key} = .*$", line, text, flags=re.MULTILINE)
        text += "" if count else line + "\n"
    file.write_text(text, encoding="utf-8")
    return file.parent


def greedy(path: Path, prompt: list[int] = PROMPT, **settings: object) -> tuple[list[int], torch.Tensor]:
    """Eight greedy tokens of a model folder in float32, and the logits of every position."""
    values = {"dtype": "float32", "device": "cpu", "session_len": 256, "cache_max_entry_count": 16, **settings}
    client = ThreadClient(path, EngineConfig(**values))  # type: ignore[arg-type]
    try:
        return answer(client, prompt, 8)
    finally:
        client.close()
