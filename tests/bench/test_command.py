"""`lmdeploy bench` with a tiny model: one JSON object on stdout, lines for people, random weights, profiles."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from lmdeploy.bench.profiling import host_step_s
from lmdeploy.bench.shapes import SHAPES
from lmdeploy.cli import main
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.engine.request import Request, SamplingParams
from lmdeploy.engine.runner import PendingStep
from tests.tiny_model import make_tiny_llama

SMALL = ("--batch-size", "3", "--prompt-tokens", "20", "--output-tokens", "6", "--repeats", "1")
KEYS = {"decode_tok_s", "prefill_tok_s", "batch_tok_s", "floor_tok_s", "load_s", "peak_rss_bytes", "ttft_s"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


def test_a_shape_by_name_gets_random_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {**SHAPES["internlm2-7b"], "num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 256}
    monkeypatch.setitem(
        SHAPES, "tiny-shape", {**small, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    )
    assert main.main(["bench", "latency", "tiny-shape", "--quant", "awq", "--kv", "int8", "--json", *SMALL]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["load_format"] == "dummy"
    assert figures["kv_bytes_per_token"] == 2 * 2 * (64 + 4)


@pytest.mark.parametrize("words", [["llama3-8b", "--preset", "h100-table"], ["internlm2-7b", "--preset", "h100-table"]])
def test_the_preset_says_what_it_needs(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "latency", *words]) == 1
    assert "--preset h100-table" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["latency", "throughput"])
def test_json_is_one_object(mode: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", mode, str(tiny), "--json", *SMALL]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    figures = json.loads(captured.out)
    assert all(figures[name] > 0 for name in KEYS)
    settings = {name: figures[name] for name in ("mode", "batch_size", "prompt_tokens", "output_tokens", "repeats")}
    assert settings == {"mode": mode, "batch_size": 3, "prompt_tokens": 20, "output_tokens": 6, "repeats": 1}
    assert figures["model"] == str(tiny)
    assert figures["decode_of_floor"] == pytest.approx(figures["decode_tok_s"] / figures["floor_tok_s"])
    assert ("output_tok_s" in figures) == (mode == "throughput")
    assert "one request 1/1" in captured.err
    assert "batch of 3 1/1" in captured.err


def test_lines_for_people(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main.main(["bench", "throughput", str(tiny), *SMALL, "--dtype", "float32", "--cache_block_seq_len", "16"]) == 0
    )
    text = capsys.readouterr().out
    for row in (
        "prefill",
        "decode, batch 1",
        "decode, batch 3",
        "whole run, batch 3",
        "of the floor",
        "GB/s",
        "peak memory",
    ):
        assert row in text
    assert "float32 on cpu" in text


def test_random_weights_from_a_config_alone(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    assert main.main(["bench", "latency", str(tmp_path), "--load-format", "dummy", "--json", *SMALL]) == 0
    assert json.loads(capsys.readouterr().out)["load_format"] == "dummy"
    assert main.main(["bench", "latency", str(tmp_path), "--json", *SMALL]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_host_time_leaves_out_the_wait_for_tokens(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny, EngineConfig(device="cpu", dtype="float32", cache_max_entry_count=8))
    wait = PendingStep.wait

    def slow_wait(pending: PendingStep) -> list[int | None]:
        time.sleep(0.05)
        return wait(pending)

    monkeypatch.setattr(PendingStep, "wait", slow_wait)
    engine.add(Request("r", [1, 2, 3], SamplingParams(max_new_tokens=20)))
    try:
        assert 0 < host_step_s(engine, 5) < 0.05
    finally:
        engine.close()
    assert PendingStep.wait is slow_wait


def test_profile(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "latency", str(tiny), "--json", "--profile", *SMALL]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)
    assert "prefill of 3 x 20 prompt tokens" in captured.err
    assert "decode of 3 x 16 tokens" in captured.err
    assert captured.err.count("Self CPU time total") == 2


def test_what_does_not_fit_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "latency", str(tiny), *SMALL, "--session-len", "16"]) == 1
    assert "do not fit session_len 16" in capsys.readouterr().err
    for flags in (("--output-tokens", "1"), ("--repeats", "0"), ("--batch-size", "x")):
        with pytest.raises(SystemExit) as exit_info:
            main.main(["bench", "latency", str(tiny), *flags])
        assert exit_info.value.code == 2
