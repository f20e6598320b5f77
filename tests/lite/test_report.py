"""The report: a plot of every layer's errors, and a notice where it cannot be drawn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lmdeploy.lite.report import format_quality, model_name, plot_errors
from tests.lite.checkpoints import make_llama, quantize, write_text

LAYERS = [{"mlp.down_proj": [0.01, "gptq"], "self_attn.o_proj": [0.0, "clip"]}, {"mlp.down_proj": [0.02, "gptq"]}]


def test_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "plot.png"
    assert plot_errors(LAYERS, file)
    assert file.read_bytes().startswith(b"\x89PNG\r\n")
    assert file.stat().st_size > 5000
    assert plot_errors([{}, {}], file)  # nothing was quantized


def test_without_matplotlib_there_is_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, told = quantize(make_llama(tmp_path / "model"), tmp_path / "out", write_text(tmp_path), search="none")
    assert any("matplotlib is not installed" in line for line in told)
    assert not (tmp_path / "out" / "layer_errors.png").exists()
    assert "layer_errors.png" not in (tmp_path / "out" / "README.md").read_text()


def test_readme_says_what_was_done_and_shows_answers(tmp_path: Path) -> None:
    model, out = make_llama(tmp_path / "model"), tmp_path / "out"
    quantize(model, out, write_text(tmp_path), command="smooth_quant", samples=True, search="none")
    text = (out / "README.md").read_text()
    assert "lmdeploy lite smooth_quant" in text
    assert "int8 weights" in text.replace("Int8", "int8")
    assert text.count("Quantized:") == 2
    assert ("layer_errors.png" in text) == (out / "layer_errors.png").exists()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/x/hub/models--owner--some-name/snapshots/0123abcd", "owner/some-name"),
        ("/x/workspace/triton_models/weights", "workspace"),
        ("/x/llama/", "llama"),
        ("/x/model.gguf", "model.gguf"),
    ],
)
def test_name_of_a_model(path: str, name: str) -> None:
    assert model_name(Path(path)) == name


def test_perplexity_of_garbage_is_short() -> None:
    figures = {"ppl": 1e304, "ppl_ref": 12.5, "kl": 9.0, "top1": 0.0, "bytes": 2**20, "bits_per_weight": 4.5}
    assert format_quality(figures, 7).startswith("perplexity        1.0e+304   (original 12.500, 7 tokens scored)")
