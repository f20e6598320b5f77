"""The convert lines of every version parse and run; a workspace goes wherever a model goes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from lmdeploy.cli import convert, main
from lmdeploy.errors import ConfigError
from lmdeploy.workspace import WEIGHTS, ConfigIni
from tests.cli.command_line import parse, run_lmdeploy
from tests.lite.checkpoints import write_text
from tests.quantization.exports import awq, export, integers
from tests.tiny_model import make_tiny_llama, train_tokenizer

# The line, with P for the model's path -> the template, and the folder that it writes.
LINES = {
    "lmdeploy convert internlm-chat-7b  P/": ("internlm-chat-7b", "workspace"),
    "lmdeploy convert internlm-chat-7b P --tp 1": ("internlm-chat-7b", "workspace"),
    "lmdeploy convert internlm-chat-7b P --tp 2": ("internlm-chat-7b", "workspace"),
    "lmdeploy convert llama2 P --model-format hf --dst-path ./w": ("llama2", "./w"),
    "lmdeploy convert qwen-7b P --model_format qwen --tokenizer_path P/tokenizer.json": ("qwen-7b", "workspace"),
    "lmdeploy convert --model_name internlm-chat-7b --model_path P --dst_path=./w2": ("internlm-chat-7b", "./w2"),
    "lmdeploy convert --model_path P internlm-chat-7b --quant_path None": ("internlm-chat-7b", "workspace"),
    "lmdeploy convert vicuna-13b P --chat-template vicuna --dtype float16 --group-size 0": ("vicuna", "workspace"),
    "lmdeploy convert hf P --trust-remote-code True": ("hf", "workspace"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=256)


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    words = shlex.split(line)
    assert words.pop(0) == "lmdeploy"
    status = main.main(words)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("line", LINES)
def test_lines_of_every_version(
    line: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name, folder = LINES[line]
    status, out, err = run(line.replace(" P", f" {tiny}"), capsys)
    assert (status, out) == (0, ""), err
    assert err.rstrip().endswith(f"Next: lmdeploy chat {folder}")
    assert ConfigIni(tmp_path / folder / WEIGHTS).text("model_name") == name
    assert ("--tp 2 changes nothing" in err) == ("--tp 2" in line)


def test_the_quantized_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
    source, _ = export("internlm2/7b", tmp_path / "made", settings, integers(awq))
    train_tokenizer(300).save(str(source / "tokenizer.json"))
    source.rename(tmp_path / "quant_output")
    line = "lmdeploy convert  internlm-chat-7b ./quant_output --model-format awq --group-size 16 --dst_path ./workspace_quant"
    status, _, err = run(line, capsys)
    assert status == 0, err
    assert "--group-size" not in err
    ini = ConfigIni(tmp_path / "workspace_quant" / WEIGHTS)
    assert (ini.text("weight_type"), ini.integer("group_size")) == ("int4", 16)


def test_the_whole_way_of_the_tutorial(tiny: Path, tmp_path: Path) -> None:
    """convert, edit, chat, evaluate, in processes of their own."""
    folder = tmp_path / "workspace"
    done = run_lmdeploy("convert", "internlm-chat-7b", str(tiny), "--dst_path", str(folder))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    file = folder / WEIGHTS / "config.ini"
    file.write_text(file.read_text().replace("quant_policy = 0", "quant_policy = 8"))
    chat = run_lmdeploy(
        "chat", "turbomind", str(folder), "--device", "cpu", "--max-new-tokens", "4", stdin="the river\n"
    )
    assert chat.returncode == 0, chat.stderr
    assert "model_name='internlm'" in chat.stderr
    assert "edited settings are in force unless flags say otherwise: quant_policy = 8" in chat.stderr
    text = write_text(tmp_path)
    compared = run_lmdeploy(
        *("lite", "evaluate", str(tiny), str(folder), "--dataset", str(text), "--device", "cpu"),
        *("--samples", "1", "--seqlen", "64", "--json"),
    )
    figures = json.loads(compared.stdout)
    assert (figures["kl"], figures["top1"]) == (pytest.approx(0, abs=1e-6), 1)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("lmdeploy convert", "MODEL_NAME is missing"),
        ("lmdeploy convert --model_name internlm2 P Q", "'Q' is one argument too many"),
        ("lmdeploy convert internlm2 no/such/model", "no/such/model"),
        ("lmdeploy convert internlm2-chat-7 P", "did you mean internlm2-chat-7b"),
        ("lmdeploy convert internlm2 P --tp 0", "--tp 0: give a number"),
        ("lmdeploy convert internlm2 P --quant-path Q", "give the folder with the quantized weights as MODEL_PATH"),
        ("lmdeploy convert internlm2 P --tokenizer-path Q", "--tokenizer-path: Q does not exist"),
        ("lmdeploy convert internlm2 P --dst-path /proc/nothing/here", "--dst-path: /proc/nothing/here cannot be"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    line: str,
    text: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(line.replace(" P", f" {tiny}"), capsys)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert text in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_built_in_model_needs_no_path() -> None:
    assert convert.name_and_path(parse("lmdeploy convert chatml")) == ("chatml", None)
    assert convert.name_and_path(parse("lmdeploy convert --chat-template chatml")) == ("chatml", None)
    with pytest.raises(ConfigError, match="MODEL_NAME is missing"):
        convert.name_and_path(parse("lmdeploy convert"))


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["convert", "-h"])
    text = capsys.readouterr().out
    for flag in ("--dst-path", "--model-format", "--group-size", "--tokenizer-path", "--tp", "(default: workspace)"):
        assert flag in text
