"""The lines of the tutorials parse and mean what they say; the commands run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmdeploy.cli import lite
from lmdeploy.errors import ConfigError
from tests.cli.command_line import parse, run_lmdeploy
from tests.lite.checkpoints import make_llama, write_text


def test_tutorial_lines() -> None:
    args = parse(
        "lmdeploy lite auto_awq M/internlm2-chat-1_8b --calib-dataset 'ptb' --calib-samples 128 --calib-seqlen 1024 "
        "--w-bits 4 --w-group-size 128 --work-dir M/internlm2-chat-1_8b-4bit"
    )
    assert (args.model, args.calib_dataset, args.calib_seqlen) == ("M/internlm2-chat-1_8b", "ptb", 1024)
    assert args.work_dir == "M/internlm2-chat-1_8b-4bit"
    args = parse("lmdeploy lite auto_awq --model  PATH --w_bits 4 --w_group_size 128 --work_dir ./quant_output")
    assert (args.model, args.w_bits, args.w_group_size, args.work_dir) == ("PATH", 4, 128, "./quant_output")
    args = parse("lmdeploy lite auto_awq M --batch-size 1 --w-sym False --trust-remote-code")
    assert (args.batch_size, args.w_sym, args.calib_samples, args.calib_seqlen) == (1, False, 128, 2048)


@pytest.mark.parametrize(
    ("flags", "search"),
    [
        ("", "best"),
        ("--search-scale", "awq"),
        ("--search-scale True", "awq"),
        ("--search-scale False", "none"),
        ("--search_scale=false", "none"),
        ("--search awq", "awq"),
        ("--search best --search-scale False", "best"),
    ],
)
def test_search_in_every_spelling(flags: str, search: str) -> None:
    assert lite._search(parse(f"lmdeploy lite auto_awq M {flags}")) == search


def test_search_scale_of_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="perhaps"):
        lite._search(parse("lmdeploy lite auto_awq M --search-scale perhaps"))


def test_commands_run_and_agree(tmp_path: Path) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    out = tmp_path / "out"
    quantized = run_lmdeploy(
        *("lite", "auto_awq", str(model), "--work-dir", str(out), "--calib-dataset", str(text), "--device", "cpu"),
        *("--calib-samples", "8", "--calib-seqlen", "32", "--w-group-size", "32", "--search", "awq", "--no-samples"),
    )
    assert (quantized.returncode, quantized.stdout) == (0, ""), quantized.stderr
    evaluated = run_lmdeploy(
        *("lite", "evaluate", str(model), str(out), "--dataset", str(text), "--device", "cpu"),
        *("--samples", "2", "--seqlen", "64", "--json"),
    )
    figures = json.loads(evaluated.stdout)
    assert set(figures) == {"ppl_ref", "ppl", "kl", "top1", "bits_per_weight", "bytes"}
    assert 0 < figures["kl"] < 1


def test_missing_text_is_one_line(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model")
    answer = run_lmdeploy(
        "lite", "auto_awq", str(model), "--calib-dataset", "no.txt", "--work-dir", str(tmp_path / "o")
    )
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1].startswith("error: calibration text 'no.txt'")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
