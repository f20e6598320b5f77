"""`lmdeploy chat` with prompts from a pipe: answers alone on stdout, everything else on stderr, old syntax included."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from lmdeploy.cli import main
from tests.cli.command_line import run_lmdeploy
from tests.tiny_model import make_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), generation_config={"do_sample": True, "temperature": 0.6})


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of the free memory must not be gigabytes here."""
    monkeypatch.setattr("lmdeploy.engine.memory._host_memory", lambda: (256 << 20, 256 << 20))


def chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stdin: str, *arguments: object
) -> tuple[int, str, str]:
    """(status, stdout, stderr) of `lmdeploy chat`, in this process."""
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    status = main.main(["chat", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_answers_are_greedy_and_alone_on_stdout(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, once, err = chat(capsys, monkeypatch, "hello\nworld\n\nexit\nnever\n", tiny, "--max-new-tokens", 8)
    assert status == 0, err
    assert once.count("\n") >= 1
    assert once.endswith("\n")
    for text in (
        "chat_template_config:\nChatTemplateConfig(",
        "engine_cfg:\nTurbomindEngineConfig(",
        "sampling: greedy",
    ):
        assert text in err
    assert "session_len=512" in err
    assert f"model_name={str(tiny)!r}" in err
    assert "KV blocks" in err
    assert "weights" in err
    assert "8 answered" in err
    assert "double enter" not in err
    assert chat(capsys, monkeypatch, "hello\nworld", tiny, "--max-new-tokens", 8)[:2] == (0, once)


def test_a_conversation_goes_on_and_ends(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (tiny, "--max-new-tokens", 6, "--cache-block-seq-len", 8)
    _, alone, _ = chat(capsys, monkeypatch, "second", *flags)
    _, out, err = chat(capsys, monkeypatch, "a first prompt\n\nsecond\n\nend\n\nsecond\n\nexit\n", *flags)
    stats = [line for line in err.splitlines() if line.startswith("[")]
    assert len(stats) == 3
    cached = [int(line.split("(")[1].split()[0]) for line in stats]
    assert cached[0] == 0 < cached[1]  # the history is reused, not computed again
    assert out.endswith(alone)
    assert out.count("\n") >= 3


def test_sampling_flags_outrank_greedy(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*flags: object) -> tuple[str, str]:
        status, out, err = chat(capsys, monkeypatch, "hello", tiny, "--max-new-tokens", 12, *flags)
        assert status == 0, err
        return out, next(line for line in err.splitlines() if line.startswith("sampling: "))

    greedy, _ = answer()
    first, shown = answer("--top-p", 0.9, "--seed", 7)
    assert shown == "sampling: temperature 0.6, top_p 0.9, top_k 50, seed 7"  # 0.6 is the model's own
    assert first == answer("--top-p", 0.9, "--seed", 7)[0]
    assert len({greedy, first, answer("--temperature", 2, "--seed", 8)[0]}) > 1


def test_tutorial_lines_answer(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms of the command that tutorials of every version use, with a tiny model in place of theirs."""
    for line in (
        (tiny,),
        (tiny, "--cache-max-entry-count", "0.5"),
        (tiny, "--cache-max-entry-count", "0.01"),
        ("turbomind", tiny, "--model-name", "internlm-chat-20b"),
        ("turbomind", f"{tiny}/", "--model-name", "internlm-chat-7b"),
        ("turbomind", tiny, "--model-name", "qwen-7b"),
        ("torch", "--model_path", tiny, "--stream_output", "True"),
    ):
        status, out, err = chat(capsys, monkeypatch, "hello\n\nexit\n", *line, "--max-new-tokens", "4")
        assert status == 0, err
        assert out.strip(), line
    assert "note: `chat torch` is now written `chat --backend pytorch`" in err
    assert "engine_cfg:\nPytorchEngineConfig(" in err


def test_a_workspace_of_an_old_version_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "workspace" / "triton_models" / "weights"
    weights.mkdir(parents=True)
    (weights / "config.ini").write_text("[llama]\nmodel_name = internlm-chat-7b\n")
    status, out, err = chat(capsys, monkeypatch, "hello", "turbomind", tmp_path / "workspace")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert "engine_cfg:" in err


def test_too_little_memory_is_told_with_numbers(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmdeploy.engine.memory._host_memory", lambda: (100 << 10, 100 << 10))
    status, out, err = chat(capsys, monkeypatch, "hello", tiny)
    assert (status, out) == (1, "")
    assert "error: no room for the KV cache" in err
    assert "MiB" in err.splitlines()[-1]


def test_a_full_session(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    long = "hello world " * 40
    status, out, err = chat(
        capsys, monkeypatch, f"{long}\n\nend\n\nhi", tiny, "--session-len", 64, "--max-new-tokens", 4
    )
    assert status == 0, err
    assert err.count("WARNING: exceed session max length. Please end the session.") == 1
    assert out.strip()  # the prompt after `end` was answered


def test_what_is_not_supported_is_one_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags in (("--tp", 2), ("--speculative-algorithm", "eagle3"), ("--adapters", "x"), ("--temperature", -1)):
        status, out, err = chat(capsys, monkeypatch, "hello", tiny, *flags)
        assert (status, out) == (1, "")
        assert err.splitlines()[-1].startswith("error: ")


def test_a_real_pipe_and_the_real_model(builtin_model: Path) -> None:
    answer = run_lmdeploy(
        "chat", "--capability", "completion", "--max-new-tokens", "8", stdin="The capital of France is\n\nexit\n"
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(" Paris")
    assert builtin_model.name in answer.stderr


def test_closed_stdout_ends_quietly(tiny: Path) -> None:
    import subprocess
    import sys

    from tests.cli.command_line import ROOT

    command = f"echo hello | {sys.executable} -m lmdeploy chat {tiny} --max-new-tokens 200 | true"
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=50, check=False)
    assert "Traceback" not in answer.stderr
    assert "Exception ignored" not in answer.stderr
