"""Where no data set can be had, the model calibrates itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmdeploy.lite.self_calibration import generate_tokens
from lmdeploy.tokenizer import Tokenizer
from tests.lite.checkpoints import make_llama, quantize


def test_text_is_diverse_and_bounded(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model")
    tokenizer = Tokenizer(model)
    ids = generate_tokens(model, tokenizer, 400, 100, "cpu")
    assert 200 <= len(ids) <= 400
    assert len(set(ids)) > 50
    text = tokenizer.decode(ids)
    assert all(topic in text for topic in ("water cycle", "compiler", "printing", "bread"))


def test_named_set_that_cannot_be_fetched_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    model = make_llama(tmp_path / "model")
    figures, told = quantize(model, tmp_path / "out", Path("ptb"), search="none", calib_samples=6, calib_seqlen=64)
    assert "wrote itself" in str(figures["calib"])
    assert any("writes its own calibration text" in line for line in told)
    assert (tmp_path / "out" / "calibration.txt").stat().st_size > 100
