from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from lmdeploy.engine import memory
from tests.tiny_model import make_tiny_llama

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(
    example: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: (1 << 30, 1 << 28))
    monkeypatch.setattr(sys, "argv", [str(example), str(tiny)])
    runpy.run_path(str(example), run_name="__main__")
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) >= 2
    assert "Traceback" not in captured.err
