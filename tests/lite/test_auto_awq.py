"""The whole way from a checkpoint to a quantized folder, on tiny models: what comes out, what resumes, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdeploy.errors import ConfigError, LMDeployError
from lmdeploy.lite import quantize as command
from lmdeploy.quantization.packing import AffineTensor
from tests.lite.checkpoints import make_golden, make_llama, quantize, write_text
from tests.tiny_model import make_tiny_llama


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


def test_another_text_under_the_same_name_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    monkeypatch.setattr(command, "_assemble", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", text, search="none")
    monkeypatch.undo()
    text.write_text(text.read_text() + " And one more.")
    _, told = quantize(model, tmp_path / "out", text, search="none")
    assert not any("interrupted" in line for line in told)


def test_broken_weights_name_the_layer(tmp_path: Path) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, model / "model.safetensors")
    with pytest.raises(LMDeployError, match=r"layer 1, mlp\.gate_up_proj"):
        quantize(model, tmp_path / "out", text)
    with pytest.raises(LMDeployError, match=r"layer 1, mlp\.gate_up_proj"):
        quantize(model, tmp_path / "out", text, calib_samples=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["auto_awq", "auto_gptq", "smooth_quant"])
def test_broken_inputs_of_a_linear_name_the_layer(command: str, tmp_path: Path) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors")
    with pytest.raises(LMDeployError, match=r"layer 1, self_attn\.qkv_proj"):
        quantize(model, tmp_path / "out", text, command=command)


@pytest.mark.parametrize(
    ("name", "factor", "message"),
    [("model.norm.weight", float("nan"), "holds NaN"), ("lm_head.weight", 1e6, "try --dtype|--dtype bfloat16")],
)
def test_damage_outside_the_layers_is_found_before_they_are_read(
    name: str, factor: float, message: str, tmp_path: Path
) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    weights = load_file(model / "model.safetensors")
    save_file({**weights, name: weights[name] * factor}, model / "model.safetensors")
    with pytest.raises(LMDeployError, match=f"{name}.*({message})"):
        quantize(model, tmp_path / "out", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.txt", "model"]


def test_garbage_names_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    monkeypatch.setattr(AffineTensor, "dequantize", lambda self, dtype: torch.full(self.shape, 3.0))
    with pytest.raises(LMDeployError, match=r"layer 0: .* nothing to do with the original"):
        quantize(model, tmp_path / "out", text, search="none")


def test_model_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model", hidden_size=80, intermediate_size=176, num_attention_heads=4)
    with pytest.raises(ConfigError, match=r"none of this model's linears.* 80, 176 inputs"):
        quantize(model, tmp_path / "out", write_text(tmp_path))
    assert not list(tmp_path.glob("out*"))


def test_dense_experts_are_named(tmp_path: Path) -> None:
    model, out = make_golden("gpt_oss/bf16", tmp_path / "model"), tmp_path / "out"
    _, told = quantize(model, out, write_text(tmp_path), search="none")
    kept = next(line for line in told if line.startswith("kept in 16 bits"))
    assert "experts.down_proj" in kept
    assert "bias" not in kept
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.experts.gate_up_proj" in config["modules_to_not_convert"]


def test_statistics_of_calibrate_are_said_not_to_be_read(tmp_path: Path) -> None:
    model, text, out = make_llama(tmp_path / "model"), write_text(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "inputs_stats.pth").write_text("statistics")
    _, told = quantize(model, out, text, search="none")
    assert any("inputs_stats.pth is not read" in line and "calibrating anew" in line for line in told)
    assert (out / "inputs_stats.pth").read_text() == "statistics"
    _, told = quantize(model, tmp_path / "other", text, search="none")
    assert not any("anew" in line for line in told)


def test_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    quantize(model, tmp_path / "out", text, search="none")
    with pytest.raises(ConfigError, match=r"quantized already \(awq\)"):
        quantize(tmp_path / "out", tmp_path / "again", text)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantized already \(affine4\)"):
        quantize(tmp_path / "out", tmp_path / "again", text)


def test_group_that_divides_nothing_is_replaced(tmp_path: Path) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    _, told = quantize(model, tmp_path / "out", text, search="none", w_group_size=128)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == 64
    assert any("groups of 128" in line for line in told)
