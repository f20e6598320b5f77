"""`lmdeploy serve api_server`: command lines of every era, refusals before a model is loaded, the server's settings."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path
from typing import Any

import pytest

from lmdeploy.cli import main, serve
from lmdeploy.cli.listening import tls_files
from lmdeploy.errors import ConfigError
from lmdeploy.serve.settings import ServerSettings
from tests.cli.command_line import parse, parse_with_notices
from tests.tiny_model import make_tiny_llama

OLD_LINES = {
    "lmdeploy serve api_server PATH --model-format hf --quant-policy 0 --server-name 0.0.0.0 --server-port 23333 --tp 1": 0,
    "lmdeploy serve api_server a//b-4bit --cache-max-entry-count 0.4 --model-format awq --quant-policy 0 \\\n"
    "  --server-name 0.0.0.0 --server-port 23333 --tp 1": 0,
    "lmdeploy serve api_server X --model-format awq --quant-policy 4 --cache-max-entry-count 0.1\\\n  --server-name 0.0.0.0": 0,
    "lmdeploy serve api_server ./workspace --server_name 0.0.0.0 --server_port 23333 --instance_num 64 --tp 1": 3,
    "lmdeploy serve api_server X --restful_api True --cap chat --meta_instruction text --qos-config-path ''": 4,
    "lmdeploy serve api_server --model_path X": 1,
}


@pytest.mark.parametrize("line", OLD_LINES)
def test_command_lines_of_every_era(line: str) -> None:
    args, notices = parse_with_notices(line)
    assert (args.command, args.kind) == ("serve", "api_server")
    assert args.model is not None
    assert args.server_name == ("0.0.0.0" if "0.0.0.0" in line else "127.0.0.1")
    assert args.server_port == 23333
    assert len(notices) == OLD_LINES[line]
    if "instance_num" in line:
        assert args.max_batch_size == 64


def test_flags_become_settings() -> None:
    line = (
        "lmdeploy serve api_server M --api-keys a b --max-concurrent-requests 9 --model-name n --allow-origins http://x "
        "--allow-credentials --disable-fastapi-docs --disable-metrics"
    )
    assert serve._settings(parse(line)) == ServerSettings(
        "n",
        ("a", "b"),
        9,
        allow_origins=("http://x",),
        allow_credentials=True,
        has_docs=False,
        has_metrics=False,
        tool_call_parser="auto",
        reasoning_parser="auto",
    )


def test_the_name_of_the_model(tmp_path: Path) -> None:
    for given, name in (
        ("", "smollm2-135m-instruct"),
        ("SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("a/b", "a/b"),
    ):
        assert serve._settings(parse(f"lmdeploy serve api_server {given}")).model_name == name


@pytest.mark.parametrize(
    "flag", [flag for flag in serve.LATER_FLAGS if not flag.is_harmless], ids=lambda flag: flag.name
)
def test_what_is_not_there_is_refused_before_anything_is_loaded(
    flag: serve.LaterFlag, capsys: pytest.CaptureFixture[str]
) -> None:
    value = [] if flag.kind is bool else ["7" if flag.kind in (int, float) else "something"]
    assert main.main(["serve", "api_server", "./no/such/model", flag.name, *value]) == 1
    err = capsys.readouterr().err
    assert f"{flag.name} " in err
    assert "not supported yet" in err


def test_a_port_in_use_is_told_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main.main(["serve", "api_server", "./no/such/model", "--server-port", str(port)]) == 1
    err = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}" in err
    assert main.main(["serve", "api_server", "./no/such/model", "--server-port", "70000"]) == 1
    assert main.main(["serve", "api_server", "./no/such/model", "--server-port", "0"]) == 1
    assert "no/such/model" in capsys.readouterr().err


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serve, "_EXTRA", ("uvicorn", "no_such_package"))
    assert main.main(["serve", "api_server", "./no/such/model"]) == 1
    assert capsys.readouterr().err == (
        "error: no_such_package missing; the server needs the extra `serve`: pip install 'lmdeploy[serve]'\n"
    )


def test_tls_needs_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = parse("lmdeploy serve api_server M --ssl")
    monkeypatch.delenv("SSL_KEYFILE", raising=False)
    with pytest.raises(ConfigError, match="SSL_KEYFILE"):
        tls_files(args)
    (tmp_path / "key").write_text("")
    monkeypatch.setenv("SSL_KEYFILE", str(tmp_path / "key"))
    monkeypatch.setenv("SSL_CERTFILE", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="SSL_CERTFILE"):
        tls_files(args)
    monkeypatch.setenv("SSL_CERTFILE", str(tmp_path / "key"))
    tls = tls_files(args)
    assert tls is not None
    assert (tls.key_file, tls.cert_file) == (str(tmp_path / "key"), str(tmp_path / "key"))


def test_defaults_of_another_folder() -> None:
    with pytest.raises(ConfigError, match="give auto, lmdeploy, or a folder"):
        serve._folder("/no/such/folder")


# Command lines of tutorials; M is the model.
TUTORIAL_LINES = (
    "api_server M --model-format hf --quant-policy 0 --server-name 0.0.0.0 --server-port 23333 --tp 1",
    "api_server M --cache-max-entry-count 0.4 --model-format awq --quant-policy 0 --server-name 0.0.0.0 "
    "--server-port 23333 --tp 1",
    "api_server M --model-format awq --quant-policy 4 --cache-max-entry-count 0.1\\\n  --server-name 0.0.0.0 "
    "--server-port 23333 --tp 1",
    "api_server M/ --model-format awq --quant-policy 4 --cache-max-entry-count 0.1 --server-name 0.0.0.0 "
    "--server-port 23333 --tp 1",
    "api_server M --server_name 0.0.0.0 --server_port 23333 --instance_num 64 --tp 1",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), hidden_size=128)


@pytest.mark.parametrize("line", TUTORIAL_LINES)
def test_command_lines_of_the_tutorials_start(
    line: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the wait for requests; the engine on a thread."""
    from lmdeploy.engine import process
    from lmdeploy.engine.client import ThreadClient
    from lmdeploy.serve import server

    bound: list[Any] = []
    bind = server.bind
    monkeypatch.setattr(process, "ProcessClient", ThreadClient)
    monkeypatch.setattr(server, "bind", lambda *address: bound.append(address) or bind("127.0.0.1", 0))
    monkeypatch.setattr(server.Server, "run_on", lambda self, sock: bound.append(self) or sock.close() or 0)
    monkeypatch.setenv("LMDEPLOY_DEVICE_MEMORY", "16GiB")
    line = line.replace("\\\n", "").replace("M", str(tiny), 1)
    assert main.main(["serve", *shlex.split(line)]) == 0
    assert bound[0] == ("0.0.0.0", 23333)
    assert isinstance(bound[1], server.Server)
    err = capsys.readouterr().err
    assert f"serving {tiny}" in err
    if "instance" in line:
        assert bound[1]._service.engine.client.info.max_batch_size == 64


@pytest.mark.parametrize("words", [["-h"], ["api_server", "-h"]])
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main.main(["serve", *words])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "api_server" in out
    assert ("--server-port" in out) == (words != ["-h"])


def test_flags_of_administration_and_the_log() -> None:
    line = (
        "lmdeploy serve api_server M --admin-api-key k --weights-dir /w --allow-terminate-by-client --enable-abort-handling "
        "--max-queued-tokens 7 --log-format json"
    )
    settings = serve._settings(parse(line))
    assert (settings.admin_api_key, settings.weights_dir) == ("k", Path("/w"))
    assert (settings.allow_terminate, settings.allow_abort, settings.has_request_log) == (True, True, True)
    assert settings.max_queued_tokens == 7
