"""The tool that compares the engine with golden folders: it passes what is right, and finds what is not."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import golden

GOLDENS = Path(__file__).parent / "goldens"


def copy_folder(name: str, target: Path) -> Path:
    return Path(shutil.copytree(GOLDENS / name, target / name))


def change(folder: Path, key: str, position: int, value: float) -> None:
    """Set one element of one expected tensor, counted in flattened order."""
    data = load_file(folder / golden.GOLDEN_FILE)
    data[key].view(-1)[position] = value
    save_file(data, folder / golden.GOLDEN_FILE)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["llama/llama3.1", "internlm2/2.5-dynamic", "internlm/7b-dynamic", "qwen/7b-ntk-logn"])
def test_folders_that_agree(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A plain folder, and one of each kind of rope scaling that follows the length."""
    assert golden.main([str(GOLDENS / name)]) == 0
    (line,) = lines(capsys)
    words = line.split()
    assert words[0] == name
    assert 0 < float(words[1].removeprefix("abs=")) < 1e-3
    assert 0 < float(words[2].removeprefix("rel=")) < golden.MAX_RELATIVE_DIFFERENCE
    assert " ".join(words[3:]) == "p0 16/16 p1 16/16 p2 16/16 ok"


def test_a_parent_folder_and_folders_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong logit, a wrong token, NaN and an unknown architecture fail, each alone, and the run goes on."""
    folders = {name: copy_folder("llama/llama3.1", tmp_path / name) for name in ("logit", "nan", "token", "unknown")}
    logits = load_file(folders["logit"] / golden.GOLDEN_FILE)["p2.logits"]
    change(folders["logit"], "p2.logits", 7, float(logits.view(-1)[7]) + 2e-3 * float(logits.abs().max()))
    change(folders["nan"], "p0.logits", 0, math.nan)
    change(folders["token"], "p1.greedy_cached", 3, 0)
    config = folders["unknown"] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["NoSuchForCausalLM"]}))
    assert golden.main([str(tmp_path)]) == 1
    found = lines(capsys)
    assert [line.split()[0] for line in found] == ["llama/llama3.1"] * 4
    assert found[0].endswith("p0 16/16 p1 16/16 p2 16/16 FAIL p2: rel above 0.001")
    assert "rel=nan" in found[1]
    assert found[1].endswith("FAIL p0: rel above 0.001")
    assert found[2].endswith("p0 16/16 p1 15/16 p2 16/16 FAIL p1: 1 of 16 tokens differ")
    assert "FAIL ModelNotSupported: architecture 'NoSuchForCausalLM'" in found[3]


def test_a_folder_without_goldens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main([str(tmp_path)]) == 1
    assert "FAIL there is no golden.safetensors" in lines(capsys)[0]


def test_tokens_of_the_cache_are_preferred() -> None:
    """internlm2/2.5-dynamic has both kinds and they differ, so that it matters which is compared."""
    data = load_file(GOLDENS / "internlm2/2.5-dynamic" / golden.GOLDEN_FILE)
    assert not torch.equal(data["p2.greedy"], data["p2.greedy_cached"])
