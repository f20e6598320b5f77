"""The lines of the tutorials parse and mean what they say; the commands run on a tiny model."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lmdeploy.cli import lite
from lmdeploy.cli.main import main
from lmdeploy.errors import ConfigError
from tests.cli.command_line import parse, run_lmdeploy
from tests.lite.checkpoints import FakeDatasets, greedy, make_llama, write_text


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


@pytest.mark.parametrize(
    ("flags", "search"), [("", "best"), ("--search-scale", "best"), ("--search_scale False", "none")]
)
def test_search_of_smooth_quant(flags: str, search: str) -> None:
    assert lite._search(parse(f"lmdeploy lite smooth_quant M {flags}")) == search


def test_search_scale_of_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="perhaps"):
        lite._search(parse("lmdeploy lite auto_awq M --search-scale perhaps"))


@pytest.mark.parametrize("command", ["auto_awq", "auto_gptq", "calibrate", "smooth_quant"])
def test_flags_that_all_have(command: str) -> None:
    args = parse(
        f"lmdeploy lite {command} --model M --revision main --download_dir D --calib-dataset c4 --calib-samples 8 "
        "--calib-seqlen 64 --batch-size 2 --dtype bfloat16 --trust-remote-code --device cpu"
    )
    assert (args.model, args.calib_dataset, args.calib_samples, args.calib_seqlen) == ("M", "c4", 8, 64)
    assert (args.work_dir, args.dtype, args.batch_size) == ("./work_dir", "bfloat16", 2)


@pytest.mark.parametrize("dtype", ["int8", "fp8", "float8_e4m3fn", "float8_e5m2"])
def test_quant_dtypes(dtype: str) -> None:
    assert parse(f"lmdeploy lite smooth_quant M --quant-dtype {dtype}").quant_dtype == dtype


def test_symmetry_by_default() -> None:
    assert not parse("lmdeploy lite auto_awq M").w_sym
    assert parse("lmdeploy lite auto_gptq M").w_sym
    assert not parse("lmdeploy lite auto_gptq M --no-w-sym").w_sym


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["lite", "-h"])
    assert main(["lite"]) == 0
    shown = capsys.readouterr().out
    for name in ("auto_awq", "auto_gptq", "smooth_quant", "calibrate", "kv_qparams", "evaluate"):
        assert shown.count(f"    {name}") == 2


# ---- the tutorials' lines, run ----

LINES = {
    "MODELS/internlm2-chat-1_8b": (
        "lite auto_awq MODELS/internlm2-chat-1_8b --calib-dataset 'ptb' --calib-samples 128 --calib-seqlen 1024 --w-bits 4 "
        "--w-group-size 128 --work-dir MODELS/internlm2-chat-1_8b-4bit"
    ),
    "MODELS/InternVL2-26B": (
        "lite auto_awq MODELS/InternVL2-26B --calib-dataset 'ptb' --calib-samples 128 --calib-seqlen 2048 --w-bits 4 "
        "--w-group-size 128 --batch-size 1 --search-scale False --work-dir MODELS/InternVL2-26B-w4a16-4bit"
    ),
    "MODELS/OpenGVLab/Mini-InternVL-Chat-2B-V1-5": (
        "lite auto_awq MODELS/OpenGVLab/Mini-InternVL-Chat-2B-V1-5 --work-dir MODELS/Mini-InternVL-Chat-2B-V1-5-AWQ"
    ),
    "MODELS/Shanghai_AI_Laboratory/internlm-xcomposer2-vl-7b": (
        "lite auto_awq MODELS/Shanghai_AI_Laboratory/internlm-xcomposer2-vl-7b "
        "--work-dir MODELS/internlm-xcomposer2-vl-7b-AWQ"
    ),
}


@pytest.fixture
def named_sets(monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    """A `datasets` library that gives some 5000 tokens of text under every name."""
    words = " ".join(f"word{i * 7919 % 613} and {i * 104729 % 997}, then the river." for i in range(330))
    library = FakeDatasets([{"sentence": words}])
    monkeypatch.setitem(sys.modules, "datasets", library)
    return library


def run_line(line: str) -> int:
    return main(shlex.split(line))


@pytest.mark.parametrize("path", LINES)
def test_tutorial_line_runs(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named_sets: FakeDatasets
) -> None:
    monkeypatch.chdir(tmp_path)
    make_llama(tmp_path / path)
    line = LINES[path]
    assert run_line(line) == 0
    output = tmp_path / line.split("--work-dir ")[1]
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"]) == ("awq", 4)
    assert (output / "quality.json").exists()
    assert len(named_sets.asked) == 1
    assert len(greedy(output)[0]) == 6


def test_lines_of_version_0_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    named_sets: FakeDatasets,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make_llama(tmp_path / "PATH")
    weights = tmp_path / "workspace" / "triton_models" / "weights"
    weights.mkdir(parents=True)
    calibrate = 'lite calibrate --model  PATH --calib_dataset "c4" --calib_samples 128 --calib_seqlen 2048'
    assert run_line(f"{calibrate} --work_dir ./quant_output") == 0
    scales = "lite kv_qparams --work_dir ./quant_output --turbomind_dir workspace/triton_models/weights/"
    assert run_line(f"{scales} --kv_sym False --num_tp 1") == 0
    names = [f"layers.{layer}.past_kv_scale.0.weight" for layer in range(3)]
    assert sorted(path.name for path in weights.iterdir()) == names
    assert all((weights / name).stat().st_size == 16 for name in names)
    positional = "lite kv_qparams quant_output workspace/triton_models/weights --kv-bits 8 --kv-sym --num-tp 2"
    assert run_line(positional) == 0
    assert "nothing reads them there" in capsys.readouterr().err
    (weights / "config.ini").write_text("[llama]\n")
    assert run_line(positional) == 0
    assert "nothing reads them there" not in capsys.readouterr().err
    (weights / "config.ini").unlink()
    assert (weights / "layers.0.past_kv_scale.1.weight").stat().st_size == 8
    assert run_line("lite auto_awq --model  PATH --w_bits 4 --w_group_size 128 --work_dir ./quant_output") == 0
    assert "calibrating anew" in capsys.readouterr().err
    names_there = {path.name for path in (tmp_path / "quant_output").iterdir()}
    assert {"inputs_stats.pth", "key_stats.pth", "model.safetensors", "config.json"} <= names_there


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataset {text} --seqlen 0", "--seqlen 0: at least"),
        ("--dataset {text} --samples 0", "--samples 0, "),
        ("--dataset self", "--dataset self: "),
        ("--dataset no.txt", "'no.txt' is neither"),
    ],
)
def test_bad_input_of_evaluate(flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    assert run_line(f"lite evaluate {model} {model} {flags.format(text=text)}") == 1
    assert message in capsys.readouterr().err


def test_evaluate_names_the_model_that_gives_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    broken = make_llama(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file(
        {**weights, "model.norm.weight": weights["model.norm.weight"] * float("nan")}, broken / "model.safetensors"
    )
    assert run_line(f"lite evaluate {model} {broken} --dataset {text} --samples 1 --seqlen 32 --json") == 1
    shown = capsys.readouterr()
    assert f"error: {broken} predicts NaN" in shown.err
    assert shown.out == ""


def test_kv_qparams_needs_two_folders(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_line("lite kv_qparams --work_dir x") == 1
    assert "give two folders" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["auto_gptq", "smooth_quant --quant-dtype fp8"])
def test_other_formats_run(command: str, tmp_path: Path) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    out = tmp_path / "out"
    calibration = f"--calib-dataset {text} --calib-samples 8 --calib-seqlen 32 --no-samples"
    assert run_line(f"lite {command} {model} --work-dir {out} {calibration}") == 0
    assert len(greedy(out)[0]) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--calib-dataset no.txt", "error: calibration text 'no.txt'"),
        ("--w-bits 3", "error: --w-bits 3"),
        ("--w-group-size 100", "error: --w-group-size 100"),
        ("--calib-dataset {empty}", "error: calibration text"),
        ("--device cuda", "error: --device cuda"),
    ],
)
def test_bad_input_is_one_line(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model, empty = make_llama(tmp_path / "model"), tmp_path / "empty.txt"
    empty.write_text("")
    line = f"lite auto_gptq {model} --work-dir {tmp_path / 'out'} {flags.format(empty=empty)}"
    assert run_line(line) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "model"]


def test_killed_process_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    model, text = make_llama(tmp_path / "model"), write_text(tmp_path)
    flags = f"--calib-dataset {text} --calib-samples 64 --calib-seqlen 128 --w-group-size 32 --no-samples --device cpu"
    line = f"lite auto_awq {model} {flags} --work-dir"
    killed, partial = tmp_path / "killed", tmp_path / "killed.partial"
    with subprocess.Popen(
        [sys.executable, "-m", "lmdeploy", *shlex.split(line), str(killed)], stderr=subprocess.DEVNULL
    ) as process:
        while not list(partial.glob("layer-*.safetensors")):
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not killed.exists()
    assert run_line(f"{line} {killed}") == run_line(f"{line} {tmp_path / 'whole'}") == 0
    assert not partial.exists()
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole"))
    assert first == second


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
