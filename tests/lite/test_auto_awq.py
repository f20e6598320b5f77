"""The whole way from a checkpoint to a quantized folder, on tiny models: what comes out, what resumes, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lmdeploy.engine.client import ThreadClient
from lmdeploy.engine.config import EngineConfig
from lmdeploy.errors import ConfigError, LMDeployError
from lmdeploy.lite import auto_awq as command
from lmdeploy.lite.stream import LayerStream
from lmdeploy.models.weights import dense
from tests.golden import answer
from tests.lite.checkpoints import make_golden, make_llama, quantize, read_folder, write_text

PROMPT = [5, 17, 40, 9, 100, 33]


def greedy(folder: Path) -> tuple[list[int], torch.Tensor]:
    client = ThreadClient(folder, EngineConfig(dtype="float32", device="cpu", session_len=64, cache_max_entry_count=8))
    try:
        return answer(client, PROMPT, 6)
    finally:
        client.close()


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


@pytest.mark.parametrize("name", ["llama", "internlm2/7b", "qwen2_moe/base", "chatglm/chatglm2-6b"])
def test_engine_reads_what_an_independent_reader_reads(name: str, tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model") if name == "llama" else make_golden(name, tmp_path / "model")
    quantize(model, tmp_path / "out", write_text(tmp_path), search="awq")
    out = tmp_path / "out"
    source = LayerStream(out, torch.device("cpu")).source
    expected = read_folder(out)
    assert set(source.infos) == set(expected)
    assert any(info.kind == "affine4" for info in source.infos.values())
    for tensor, value in expected.items():
        torch.testing.assert_close(dense(source.read(tensor)).float(), value, rtol=1e-5, atol=1e-6)
    ids, logits = greedy(out)
    prompt_rows = slice(0, len(PROMPT))  # what follows them depends on the tokens that were chosen
    original = greedy(model)[1][prompt_rows]
    assert len(ids) == 6
    assert (logits[prompt_rows] - original).norm() < 0.5 * original.norm()


def test_best_is_closer_than_plain(tmp_path: Path) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    kl = {}
    for search in ("none", "best"):
        figures, _ = quantize(model, tmp_path / search, text, search=search, calib_samples=24)
        kl[search] = figures["kl"]
    assert kl["best"] < 0.8 * kl["none"]  # type: ignore[operator]


def test_killed_run_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    quantize(model, tmp_path / "whole", text)
    calls = []

    def dies_at_the_last_layer(*args: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    real = command.quantize_layer
    monkeypatch.setattr(command, "quantize_layer", dies_at_the_last_layer)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "resumed", text)
    assert not (tmp_path / "resumed").exists()
    calls.clear()
    _, told = quantize(model, tmp_path / "resumed", text)
    assert len(calls) == 1
    assert any("interrupted" in line for line in told)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]


def test_other_settings_start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    monkeypatch.setattr(command, "_assemble", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", text)
    monkeypatch.undo()
    _, told = quantize(model, tmp_path / "out", text, search="awq")
    assert not any("interrupted" in line for line in told)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w_bits": 3}, "--w-bits 3"),
        ({"w_group_size": 100}, "--w-group-size 100"),
        ({"calib_samples": 1}, "--calib-samples 1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"calib_seqlen": 100_000}, "--calib-seqlen 100000"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, int], message: str, tmp_path: Path) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    with pytest.raises(ConfigError, match=message):
        quantize(model, tmp_path / "out", text, **settings)
    assert not (tmp_path / "out").exists()


def test_missing_and_empty_text_are_refused(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model")
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        quantize(model, tmp_path / "out", tmp_path / "no.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(ConfigError, match="empty"):
        quantize(model, tmp_path / "out", empty)
    assert not (tmp_path / "out").exists()


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


def test_transformers_reads_the_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    quantize(model, tmp_path / "out", text, search="none")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    quantization = transformers.AwqConfig(**config.quantization_config)
    assert (quantization.bits, quantization.group_size, quantization.zero_point) == (4, 32, True)
