"""Folding scales into what writes an input leaves every family's layers as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmdeploy.lite import naming
from lmdeploy.lite.layer import LayerRunner
from lmdeploy.lite.scaling import Unit, find_groups
from lmdeploy.lite.stream import LayerStream, linears_of
from tests.goldens.materialize import materialize

GOLDENS = Path(__file__).parent.parent / "goldens"
# Family -> groups of its second layer: norms, values to output, and up to down for each expert.
FAMILIES = {
    "llama/llama3.1": 4,
    "internlm/7b": 4,
    "internlm2/7b": 4,
    "chatglm/chatglm2-6b": 4,
    "baichuan/13b-alibi": 4,
    "falcon/7b": 2,
    "falcon/40b": 3,
    "falcon/rw-1b-alibi": 2,
    "gemma2/base": 4,
    "glm4/0414": 4,
    "phi3/mini-4k": 4,
    "qwen/7b": 4,
    "qwen3/base": 4,
}


def expert_units(layer: torch.nn.Module) -> list[Unit]:
    """A unit for each linear, and for the experts' down projections one each."""
    units = []
    for path, linear in linears_of(layer).items():
        count = len(linear.parts) if path == "mlp.down_proj" else 1
        size = linear.out_features // count
        units += [
            Unit(path, linear, slice(i * size, (i + 1) * size), (path, i if count > 1 else None)) for i in range(count)
        ]
    return units


def scaled_difference(folder: Path) -> tuple[float, int]:
    """How much random scales change the second layer's output, relative to its largest number; and how many groups."""
    torch.manual_seed(0)
    stream = LayerStream(folder, torch.device("cpu"))
    layer = stream.load_layer(1)
    hidden = torch.randn(2, 24, stream.config.hidden_size)
    run = LayerRunner(stream, 24)
    before = run(layer, hidden)
    writable = naming.writable_modules(naming.layer_origins(stream, 1), 1)
    groups = find_groups(layer, [unit for unit in expert_units(layer) if unit.path in writable], stream.config)
    for group in groups:
        group.fold(torch.rand(group.source_size) + 0.5)
    after = run(layer, hidden)
    return ((after - before).abs().max() / before.abs().max()).item(), len(groups)


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_changes_nothing(family: str, tmp_path: Path) -> None:
    with torch.inference_mode():
        difference, count = scaled_difference(materialize(GOLDENS / family, tmp_path / "model"))
    assert difference < 1e-5
    assert count == FAMILIES[family]


@pytest.mark.parametrize("family", ["qwen2_moe/base", "mixtral/base", "deepseek_moe/16b", "deepseek_v2/full"])
def test_folding_changes_nothing_for_experts(family: str, tmp_path: Path) -> None:
    with torch.inference_mode():
        difference, count = scaled_difference(materialize(GOLDENS / family, tmp_path / "model"))
    assert difference < 1e-5
    assert count > 5
