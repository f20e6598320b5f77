"""`lmdeploy serve api_client` and `serve gradio`: command lines of every era parse, reach their work, or say what is wrong."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmdeploy import env
from lmdeploy.cli import main, serve_gradio
from tests.cli.command_line import ROOT, parse, parse_with_notices

# The tutorials' lines, and how many notices each gets. M: a model's folder.
CLIENT_LINES = {
    "lmdeploy serve api_client http://localhost:23333": 0,
    "lmdeploy serve api_client http://0.0.0.0:23333 --session_id 0": 1,
    "lmdeploy serve api_client http://localhost:23333 --session-id 1 --api-key k": 1,
    "lmdeploy serve api_client --api_server_url http://localhost:23333": 1,
    "lmdeploy serve api_client": 0,
}
SERVER_PAGE_LINES = {
    "lmdeploy serve gradio http://localhost:23333 --server-name 0.0.0.0 --server-port 6006": 0,
    "lmdeploy serve gradio http://0.0.0.0:23333 --server_name 0.0.0.0 --server_port 6006 --restful_api True": 3,
    "lmdeploy serve gradio 0.0.0.0:33337": 0,
}
MODEL_PAGE_LINES = {
    "lmdeploy serve gradio ./workspace": 0,
    "lmdeploy serve gradio MODELS/OpenGVLab/Mini-InternVL-Chat-2B-V1-5": 0,
    "lmdeploy serve gradio MODELS/OpenGVLab/InternVL-Chat-V1-5": 0,
    "lmdeploy serve gradio MODELS/internlm-xcomposer2-vl-7b": 0,
    "lmdeploy serve gradio MODELS/Mini-InternVL-Chat-2B-V1-5-AWQ --model-format awq": 0,
    "lmdeploy serve gradio M --batch_size 32 --tp 1 --server_name 0.0.0.0 --restful_api False": 3,
    "lmdeploy serve gradio M --backend turbomind --model-name n --cap chat --meta-instruction text --session-len 8192": 2,
    "lmdeploy serve gradio M --cache-max-entry-count 0.4 --quant-policy 4 --rope-scaling-factor 0.0 --max-batch-size 8": 0,
}


@pytest.mark.parametrize("line", CLIENT_LINES)
def test_lines_of_the_terminal_client(line: str) -> None:
    args, notices = parse_with_notices(line)
    assert (args.command, args.kind) == ("serve", "api_client")
    assert args.api_server_url.endswith(":23333")
    assert len(notices) == CLIENT_LINES[line]


@pytest.mark.parametrize("line", {**SERVER_PAGE_LINES, **MODEL_PAGE_LINES})
def test_lines_of_the_page(line: str) -> None:
    args, notices = parse_with_notices(line)
    assert (args.command, args.kind) == ("serve", "gradio")
    assert args.server_name == ("0.0.0.0" if "name 0.0.0.0" in line else "127.0.0.1")
    assert args.server_port == 6006
    assert len(notices) == (SERVER_PAGE_LINES | MODEL_PAGE_LINES)[line]
    assert (serve_gradio.server_url(args.model) is not None) == (line in SERVER_PAGE_LINES)


def test_what_old_flags_become() -> None:
    args = parse("lmdeploy serve gradio M --batch_size 32 --cap chat --meta_instruction 'be brief'")
    assert (args.max_batch_size, args.capability, args.system) == (32, "chat", "be brief")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a page was opened over, and its settings; nothing is loaded and nothing listens."""
    app = pytest.importorskip("lmdeploy.serve.gradio.app", reason="needs gradio")
    found: list[Any] = []
    engine = SimpleNamespace(close=lambda: found.append("closed"), model_name="remote")
    monkeypatch.setattr(serve_gradio, "_open", lambda args: found.append("model") or engine)
    monkeypatch.setattr(serve_gradio, "_open_remote", lambda args: found.append("server") or engine)
    monkeypatch.setattr(app, "run_page", lambda engine, settings, tell: found.append(settings) or 0)
    return found


@pytest.mark.parametrize("line", {**SERVER_PAGE_LINES, **MODEL_PAGE_LINES})
def test_lines_of_the_page_run(line: str, opened: list[Any]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = shlex.split(line.replace("6006", str(port)).replace("0.0.0.0 ", "127.0.0.1 ", 1) + f" --server-port={port}")
    assert main.main(words[1:]) == 0
    kind, settings, end = opened
    assert kind == ("server" if line in SERVER_PAGE_LINES else "model")
    assert settings.port == port
    assert end == "closed"


def test_addresses_and_paths(tmp_path: Path) -> None:
    file = tmp_path / "host:80"
    file.touch()
    for model, url in (
        (None, None),
        ("owner/name", None),
        ("owner/name:model.gguf", None),
        (str(file), None),
        ("http://x", "http://x"),
        ("HTTPS://x:1/v1", "HTTPS://x:1/v1"),
        ("localhost:23333", "http://localhost:23333"),
    ):
        assert serve_gradio.server_url(model) == url


def test_a_port_in_use_is_told_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main.main(["serve", "gradio", "./no/such/model", "--server-port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serve_gradio, "_EXTRA", ("no_such_package",))
    assert main.main(["serve", "gradio", "./no/such/model"]) == 1
    assert capsys.readouterr().err == (
        "error: no_such_package missing; the chat page needs the extra `gradio`: pip install 'lmdeploy[gradio]'\n"
    )


@pytest.mark.parametrize("kind", ["api_client", "gradio"])
def test_a_server_that_is_not_there(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "gradio":
        pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = ["--server-port", "0", "--tp", "2"] if kind == "gradio" else []
    assert main.main(["serve", kind, f"http://127.0.0.1:{port}", *more]) == 1
    err = capsys.readouterr().err
    assert f"error: no server answers at http://127.0.0.1:{port}" in err
    assert ("note: --tp has no effect" in err) == (kind == "gradio")
    assert main.main(["serve", kind, "http://", *more]) == 1
    assert "is no address of a server" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "usage"),
    [
        ("lmdeploy.serve.openai.api_client", "lmdeploy serve api_client"),
        ("lmdeploy.serve.openai.api_server", "lmdeploy serve api_server"),
        ("lmdeploy.serve.gradio.app", "lmdeploy serve gradio"),
    ],
)
def test_modules_that_were_run_before_there_was_a_command(module: str, usage: str) -> None:
    if "gradio" in module:
        pytest.importorskip("gradio")
    result = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert f"usage: {usage}" in " ".join(result.stdout.split())


def test_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMDEPLOY_API_KEY", "k")
    assert env.api_key() == "k"
    monkeypatch.setenv("LMDEPLOY_API_KEY", "")
    assert env.api_key() is None
