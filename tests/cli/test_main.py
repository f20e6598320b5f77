"""The command itself: help, versions, exit statuses, one-line errors, and what it must not import."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmdeploy import __version__
from lmdeploy.cli import check_env, main
from lmdeploy.errors import ConfigError
from tests.cli.command_line import ROOT, run_lmdeploy

MAX_HELP_S = 0.3


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        status = main.main(arguments)
    except SystemExit as error:
        status = int(error.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_lists_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        status, out, _ = run(capsys, *arguments)
        assert status == 0
        for command in main.COMMANDS:
            assert f"\n    {command} " in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("-v", "--version"):
        assert run(capsys, flag) == (0, f"{__version__}\n", "")


def test_misspelt_flag_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "chat", "M", "--cache-max-entry-cout", "0.5")
    assert status == 2
    assert "did you mean --cache-max-entry-count?" in err
    status, _, err = run(capsys, "chatt", "M")
    assert status == 2
    assert "no such command: chatt; did you mean chat?" in err
    status, _, err = run(capsys, "bench", "lattency")
    assert status == 2
    assert "did you mean latency?" in err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--session-len", "many"), "invalid int value: 'many'"),
        (("--cache-max-entry-count", "half"), "neither a share"),
        (("--hf-overrides", "[1]"), "no JSON object"),
        (("--hf-overrides", "{"), "is not JSON"),
        (("--dtype", "int3"), "invalid choice"),
        (("--session", "5"), "unrecognized arguments"),
    ],
)
def test_bad_values(flags: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "chat", "M", *flags)
    assert (status, out) == (2, "")
    assert text in err


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: BaseException) -> tuple[int, str, str]:
        def command(args: argparse.Namespace) -> int:
            raise error

        monkeypatch.setattr(check_env, "run", command)
        return run(capsys, "check_env")

    assert fail(ConfigError("dtype='x': use auto")) == (1, "", "error: dtype='x': use auto\n")
    assert fail(KeyboardInterrupt()) == (130, "", "")
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        fail(ZeroDivisionError())


def test_no_traceback_for_a_missing_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "chat", "./no/such/model")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert "no/such/model" in err
    assert "Traceback" not in err


def test_notices_are_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "check-env", "--dump_file", "x.pkl")
    assert (status, out) == (1, "")
    assert err.startswith("note: `--dump_file` is now written `--dump-file`\nerror: ")


def test_help_is_quick_and_light() -> None:
    """CPU time, since other tests run beside this one."""
    code = (
        "import sys, time; from lmdeploy.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'rich', 'argcomplete', 'huggingface_hub', 'jinja2', 'fastapi'}\n"
        "print(time.process_time(), *sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    times = []
    for _ in range(3):
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        words = answer.stderr.split()
        assert words[1:] == []
        times.append(float(words[0]))
    assert min(times) < MAX_HELP_S


def test_module_and_completion() -> None:
    answer = run_lmdeploy("--version")
    assert (answer.returncode, answer.stdout) == (0, f"{__version__}\n")
    for shell in ("bash", "zsh", "fish"):
        answer = run_lmdeploy("completion", shell)
        assert answer.returncode == 0
        assert "lmdeploy" in answer.stdout
        assert "_ARGCOMPLETE" in answer.stdout


def test_the_shell_gets_completions(tmp_path: Path) -> None:
    """What the completion code asks for when the user presses Tab after `--cache-m`."""
    line = "lmdeploy chat --cache-m"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    found = tmp_path / "found"
    run_lmdeploy(env={**os.environ, **asked, "_ARGCOMPLETE_STDOUT_FILENAME": str(found)})
    assert found.read_text().split() == ["--cache-max-entry-count"]
