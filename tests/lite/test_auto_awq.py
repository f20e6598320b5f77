"""The whole way from a checkpoint to a quantized folder, on tiny models: what comes out, what resumes, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmdeploy.errors import ConfigError, LMDeployError
from lmdeploy.lite import quantize as command
from tests.lite.checkpoints import make_llama, quantize, write_text


def test_folder_is_complete_and_close_to_the_original(tmp_path: Path) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    figures, told = quantize(model, tmp_path / "out", text)
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    expected = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
    assert expected.items() <= config["quantization_config"].items()
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"} <= {
        path.name for path in out.iterdir()
    }
    assert json.loads((out / "quality.json").read_text()) == figures
    assert set(figures) == {"ppl_ref", "ppl", "kl", "top1", "bits_per_weight", "bytes", "calib"}
    assert 0 < figures["kl"] < 0.2  # type: ignore[operator]
    assert not (tmp_path / "out.partial").exists()
    assert any("calib.txt" in line for line in told)


def test_best_is_closer_than_plain(tmp_path: Path) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    kl = {}
    for search in ("none", "best"):
        figures, _ = quantize(model, tmp_path / search, text, search=search, calib_samples=24)
        kl[search] = figures["kl"]
    assert kl["best"] < 0.8 * kl["none"]  # type: ignore[operator]


def test_other_settings_start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    monkeypatch.setattr(command, "_assemble", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", text)
    monkeypatch.undo()
    _, told = quantize(model, tmp_path / "out", text, search="awq")
    assert not any("interrupted" in line for line in told)


def test_broken_weights_name_the_layer(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, model / "model.safetensors")
    with pytest.raises(LMDeployError, match=r"layer 1|mlp"):
        quantize(model, tmp_path / "out", text)
    assert not (tmp_path / "out").exists()


def test_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    quantize(model, tmp_path / "out", text, search="none")
    with pytest.raises(ConfigError, match="quantized already"):
        quantize(tmp_path / "out", tmp_path / "again", text)


def test_group_that_divides_nothing_is_replaced(tmp_path: Path) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    _, told = quantize(model, tmp_path / "out", text, search="none", w_group_size=128)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == 64
    assert any("groups of 128" in line for line in told)
