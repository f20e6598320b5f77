"""What every format has in common: tiny models are quantized, written, read bit by bit, loaded, and answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lmdeploy.lite import quantize as pipeline
from lmdeploy.lite.stream import LayerStream
from lmdeploy.models.weights import dense
from tests.lite.checkpoints import greedy, logits_error, make_golden, make_llama, quantize, read_folder, write_text

MODELS = ("llama", "internlm2/7b", "qwen2_moe/base", "chatglm/chatglm2-6b")
# Command, its settings, kind of the tensors that are written.
FORMATS = {
    "awq": ({"command": "auto_awq", "search": "awq"}, "affine4"),
    "gptq": ({"command": "auto_gptq", "w_sym": True}, "affine4"),
    "gptq-zeros-8bit": ({"command": "auto_gptq", "w_bits": 8}, "affine8"),
    "int8": ({"command": "smooth_quant"}, "int8"),
    "fp8": ({"command": "smooth_quant", "quant_dtype": "fp8"}, "float8_e4m3fn"),
    "fp8-e5m2": ({"command": "smooth_quant", "quant_dtype": "float8_e5m2"}, "float8_e5m2"),
}


def make(name: str, folder: Path) -> Path:
    return make_llama(folder) if name == "llama" else make_golden(name, folder)


@pytest.mark.parametrize("form", ["awq", "gptq", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_engine_reads_what_an_independent_reader_reads(name: str, form: str, tmp_path: Path) -> None:
    check_round_trip(name, form, tmp_path)


@pytest.mark.parametrize("form", ["gptq-zeros-8bit", "fp8", "fp8-e5m2"])
def test_other_widths(form: str, tmp_path: Path) -> None:
    check_round_trip("llama", form, tmp_path)


def check_round_trip(name: str, form: str, folder: Path) -> None:
    settings, kind = FORMATS[form]
    model, out = make(name, folder / "model"), folder / "out"
    quantize(model, out, write_text(folder), **settings)
    source, expected = LayerStream(out, torch.device("cpu")).source, read_folder(out)
    assert set(source.infos) == set(expected)
    assert any(info.kind == kind for info in source.infos.values())
    for tensor, value in expected.items():
        torch.testing.assert_close(dense(source.read(tensor)).float(), value, rtol=1e-5, atol=1e-6)
    assert logits_error(out, model) < (0.5 if kind in ("affine4", "float8_e5m2") else 0.1)
    assert len(greedy(out)[0]) == 6


def test_int8_runs_in_its_own_kernel(tmp_path: Path) -> None:
    model, out = make_llama(tmp_path / "model"), tmp_path / "out"
    quantize(model, out, write_text(tmp_path), command="smooth_quant")
    rounded, exact = (greedy(path, dtype="bfloat16")[1].float() for path in (out, model))
    assert 1e-4 < ((rounded[:6] - exact[:6]).norm() / exact[:6].norm()).item() < 0.1


@pytest.mark.parametrize("form", ["awq", "gptq", "int8"])
@pytest.mark.parametrize("name", ["llama", "qwen2_moe/base"])
def test_killed_run_resumes_to_the_same_bytes(
    name: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text, settings = make(name, tmp_path / "model"), write_text(tmp_path), FORMATS[form][0]
    count = LayerStream(model, torch.device("cpu")).num_layers
    quantize(model, tmp_path / "whole", text, **settings)
    calls = []

    def dies_at_the_last_layer(*args: object) -> object:
        calls.append(args)
        if len(calls) == count:
            raise KeyboardInterrupt
        return real(*args)

    real = pipeline.quantize_layer
    monkeypatch.setattr(pipeline, "quantize_layer", dies_at_the_last_layer)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "resumed", text, **settings)
    assert not (tmp_path / "resumed").exists()
    calls[:] = [None] * count
    _, told = quantize(model, tmp_path / "resumed", text, **settings)
    assert len(calls) == count + 1
    assert any("interrupted" in line for line in told)
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "resumed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("form", ["awq", "gptq", "int8"])
def test_no_calibration_text_at_all(form: str, tmp_path: Path) -> None:
    model, out = make_llama(tmp_path / "model"), tmp_path / "out"
    figures, told = quantize(model, out, write_text(tmp_path), calib_samples=0, **FORMATS[form][0])
    assert str(figures["calib"]).startswith("no text; judged by calib.txt")
    assert any("no text" in line for line in told)
    assert 0 < figures["kl"] < 1  # type: ignore[operator]
    assert logits_error(out, model) < 0.5


def test_no_text_is_fetched_only_to_judge_by(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model")
    figures, _ = quantize(model, tmp_path / "out", Path("wikitext2"), calib_samples=0, calib_seqlen=64)
    assert "wrote itself" in str(figures["calib"])
    assert (tmp_path / "out" / "calibration.txt").exists()


def test_gptq_config_is_what_other_readers_want(tmp_path: Path) -> None:
    model, out = make_golden("qwen2_moe/base", tmp_path / "model"), tmp_path / "out"
    quantize(model, out, write_text(tmp_path), command="auto_gptq", w_sym=True)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    assert expected.items() <= config.items()
    assert r"-:^model\.layers\.0\.mlp\.gate$" in config["dynamic"]
    own = json.loads((out / "quantize_config.json").read_text())
    assert expected.items() <= own.items()


@pytest.mark.parametrize("form", ["awq", "gptq"])
def test_transformers_reads_the_config(form: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    quantize(model, tmp_path / "out", text, **FORMATS[form][0])
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    kind = {"awq": transformers.AwqConfig, "gptq": transformers.GPTQConfig}[form]
    quantization = kind.from_dict(dict(config.quantization_config))
    assert (quantization.bits, quantization.group_size) == (4, 32)
