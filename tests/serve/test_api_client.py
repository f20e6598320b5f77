"""APIClient, the server as an engine, and the terminal client, against a server on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lmdeploy.cli import main
from lmdeploy.errors import ConfigError, InvalidParameter, LMDeployError, PromptTooLong, RequestError
from lmdeploy.messages import GenerationConfig
from lmdeploy.serve.openai.api_client import APIClient, ServerError, normalise_url
from lmdeploy.serve.remote import RemoteEngine, request_fields
from lmdeploy.serve.service import Service
from tests.cli.command_line import ROOT
from tests.serve.test_real_server import KEY, running, wait_all_free

ASK = [{"role": "user", "content": "Where does the river run?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[tuple[str, Service]]:
    with running(tiny) as served:
        yield served


@pytest.fixture(scope="module")
def api(server: tuple[str, Service]) -> Iterator[APIClient]:
    with APIClient(server[0] + "/v1/", KEY) as api:
        yield api


def test_models_and_encode(api: APIClient) -> None:
    assert api.available_models == ["tiny"]
    ids, count = api.encode("the river")
    assert len(ids) == count > 0
    lists, counts = api.encode(["the river", "the"])
    assert lists[0] == ids
    assert counts == [len(one) for one in lists]
    assert api.is_ready()


def test_an_answer_whole_and_in_chunks(api: APIClient) -> None:
    (whole,) = api.chat_completions_v1("tiny", ASK, **GREEDY)
    chunks = list(api.chat_completions_v1("tiny", ASK, stream=True, **GREEDY))
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    assert text == whole["choices"][0]["message"]["content"] != ""
    (whole,) = api.completions_v1("tiny", "the river", **GREEDY)
    chunks = list(api.completions_v1("tiny", "the river", stream=True, **GREEDY))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"] != ""


def test_closing_a_stream_ends_the_answer(api: APIClient, server: tuple[str, Service]) -> None:
    stream = api.completions_v1("tiny", "the", stream=True, max_tokens=400, ignore_eos=True)
    next(stream)
    assert server[1].num_active == 1
    stream.close()
    wait_all_free(server[1])
    assert server[1].num_active == 0


def test_refusals(api: APIClient, server: tuple[str, Service]) -> None:
    with pytest.raises(RequestError, match="max_tokens"):
        list(api.chat_completions_v1("tiny", ASK, max_tokens=-1))
    with pytest.raises(RequestError, match="max_tokens"):
        list(api.chat_completions_v1("tiny", ASK, stream=True, max_tokens=-1))
    with pytest.raises(PromptTooLong):
        list(api.completions_v1("tiny", "river " * 1000))
    with pytest.raises(ServerError, match="not served here") as caught:
        list(api.completions_v1("other", "x"))
    assert caught.value.status == 404
    with pytest.raises(InvalidParameter, match="JSON"):
        list(api.completions_v1("tiny", "x", user=object()))
    with pytest.raises(InvalidParameter, match="session"):
        list(api.chat("hi", -1))
    with APIClient(server[0], "wrong") as stranger, pytest.raises(ServerError, match="API keys"):
        _ = stranger.available_models


def test_addresses() -> None:
    for given in (
        "localhost:1",
        "http://localhost:1",
        "http://localhost:1/",
        "http://localhost:1/v1",
        "localhost:1/v1//",
    ):
        assert normalise_url(given) == "http://localhost:1"
    assert normalise_url("https://host/base/v1") == "https://host/base"
    for wrong in ("", "ftp://x", "http://", "file:///etc/passwd"):
        with pytest.raises(InvalidParameter, match="no address"):
            normalise_url(wrong)
    with pytest.raises(InvalidParameter, match="no address"):
        APIClient("http://host:port")


# ---- a server that misbehaves ----

Reply = tuple[int, str, bytes]


@pytest.fixture
def scripted() -> Iterator[tuple[APIClient, dict[str, Reply], list[tuple[str, Any]]]]:
    """(client, path -> (status, content type, body), what was asked)."""
    replies: dict[str, Reply] = {}
    asked: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            asked.append((self.path, json.loads(body) if body else None))
            status, kind, content = replies.get(self.path, (404, "text/plain", b"no such page"))
            self.send_response(status)
            self.send_header("content-type", kind)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer

        def log_message(self, *args: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    with APIClient(f"http://127.0.0.1:{httpd.server_port}") as client:
        yield client, replies, asked
    httpd.shutdown()
    httpd.server_close()


def sse(*events: Any, end: bool = True) -> Reply:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + (["data: [DONE]\n\n"] if end else [])
    return 200, "text/event-stream", (": a comment\n\n" + "".join(lines)).encode()


CHAT = "/v1/chat/completions"
MODELS: Reply = (
    200,
    "application/json",
    json.dumps({"data": [{"id": "a", "max_model_len": 99}, {"id": "b"}]}).encode(),
)


@pytest.mark.parametrize(
    ("reply", "error", "text"),
    [
        ((502, "text/html", b"<h1>bad gateway</h1>"), ServerError, "bad gateway"),
        ((500, "application/json", b'{"error": {"message": "oh"}}'), ServerError, "oh"),
        ((429, "application/json", b'{"message": "full"}'), ServerError, "full"),
        ((400, "application/json", b'{"detail": "odd"}'), RequestError, "odd"),
        ((400, "application/json", b'["odd"]'), RequestError, "odd"),
        ((200, "application/json", b"no json"), ServerError, "no JSON"),
        ((200, "application/json", b"[1]"), ServerError, "no JSON object"),
    ],
)
def test_answers_that_are_none(scripted: Any, reply: Reply, error: type[LMDeployError], text: str) -> None:
    client, replies, _ = scripted
    replies[CHAT] = reply
    with pytest.raises(error, match=text):
        list(client.chat_completions_v1("m", "hi"))


def test_streams_that_break_off(scripted: Any) -> None:
    client, replies, _ = scripted
    replies[CHAT] = sse({"choices": []}, end=False)
    stream = client.chat_completions_v1("m", "hi", stream=True)
    assert next(stream) == {"choices": []}
    with pytest.raises(ServerError, match="broke off"):
        next(stream)
    replies[CHAT] = sse({"error": {"message": "the engine has stopped"}})
    with pytest.raises(ServerError, match="the engine has stopped"):
        list(client.chat_completions_v1("m", "hi", stream=True))


def test_interactive_sessions(scripted: Any) -> None:
    client, replies, asked = scripted
    parts = [
        {"text": "one", "tokens": 1, "finish_reason": None},
        {"text": " two", "tokens": 2, "finish_reason": "stop"},
    ]
    lines = "".join(json.dumps(part) + "\n" for part in parts)
    replies["/v1/chat/interactive"] = (200, "application/x-ndjson", lines.encode())
    assert list(client.chat("hi", 7, request_output_len=9)) == [("one", 1, None), (" two", 2, "stop")]
    body = {"prompt": "hi", "session_id": 7, "interactive_mode": True, "request_output_len": 9, "stream": True}
    assert asked[-1] == ("/v1/chat/interactive", body)
    replies["/v1/chat/interactive"] = (200, "application/json", json.dumps(parts[1]).encode())
    client.end_session(7)
    ended = {"prompt": "", "session_id": 7, "interactive_mode": False, "request_output_len": 0, "stream": False}
    assert asked[-1][1] == ended


# ---- a server as an engine ----


def test_a_server_as_an_engine(api: APIClient) -> None:
    engine = RemoteEngine(api)
    assert engine.model_name == "tiny"
    assert engine.client.info.session_len == 512
    config = GenerationConfig(max_new_tokens=12, do_sample=False)
    responses = list(engine.stream([(ASK, config)]))
    (whole,) = api.chat_completions_v1("tiny", ASK, **GREEDY)
    assert "".join(response.text for response in responses) == whole["choices"][0]["message"]["content"]
    last = responses[-1]
    assert last.input_token_len == len(engine.encode(ASK)) == whole["usage"]["prompt_tokens"]
    assert last.generate_token_len == whole["usage"]["completion_tokens"]
    assert last.finish_reason == whole["choices"][0]["finish_reason"]
    with pytest.raises(ConfigError, match="serves tiny, not 'other'"):
        RemoteEngine(api, "other")


def test_thoughts_and_missing_counts(scripted: Any) -> None:
    client, replies, asked = scripted
    replies["/v1/models"] = MODELS
    deltas = [{"role": "assistant"}, {"reasoning_content": "hm"}, {"reasoning_content": "m"}, {"content": "yes"}]
    replies[CHAT] = sse(*({"choices": [{"delta": delta}]} for delta in deltas))
    engine = RemoteEngine(client, "b")
    assert engine.client.info.session_len == sys.maxsize
    assert engine.encode(ASK) == engine.encode(ASK) == []
    assert [path for path, _ in asked].count("/tokenize") == 1
    responses = list(engine.stream([("hi", None)]))
    assert "".join(response.text for response in responses) == "<think>\nhmm\n</think>\n\nyes"
    assert responses[-1].generate_token_len == 3
    assert asked[-1][1]["messages"] == [{"role": "user", "content": "hi"}]
    replies[CHAT] = sse({"choices": [{"delta": {"reasoning_content": "hm"}, "finish_reason": "length"}]})
    responses = list(engine.stream([("hi", None)]))
    assert "".join(response.text for response in responses) == "<think>\nhm\n</think>\n"
    assert responses[-1].finish_reason == "length"
    replies[CHAT] = (503, "application/json", b'{"message": "later"}')
    (failed,) = engine.stream([("hi", None)])
    assert (failed.finish_reason, failed.error_code) == ("error", 503)


def test_fields_of_a_request() -> None:
    assert request_fields(GenerationConfig(max_new_tokens=None)) == {}
    assert request_fields(GenerationConfig(do_sample=False)) == {"max_tokens": 512, "temperature": 0}
    config = GenerationConfig(temperature=0.5, top_k=3, random_seed=1, stop_words=["x"], repetition_penalty=1.1)
    expected = {"temperature": 0.5, "top_k": 3, "seed": 1, "stop": ["x"], "repetition_penalty": 1.1, "max_tokens": 512}
    assert request_fields(config) == expected


def test_a_client_is_light() -> None:
    code = (
        "import sys, lmdeploy.serve.openai.api_client, lmdeploy.serve.remote; from lmdeploy import client; "
        "print({'torch', 'fastapi', 'uvicorn', 'gradio'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "set()\n"


# ---- lmdeploy serve api_client ----


def test_the_terminal_client(
    server: tuple[str, Service], api: APIClient, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "prompts"
    file.write_text("Where does the river run?\n\nexit\n")
    monkeypatch.setenv("LMDEPLOY_API_KEY", KEY)
    with file.open() as prompts:
        monkeypatch.setattr(sys, "stdin", prompts)
        assert main.main(["serve", "api_client", server[0], "--max-new-tokens", "12"]) == 0
    (whole,) = api.chat_completions_v1("tiny", ASK, **GREEDY)
    out, err = capsys.readouterr()
    assert out == whole["choices"][0]["message"]["content"] + "\n"
    assert f"tiny at {server[0]}" in err
    assert f"[{whole['usage']['prompt_tokens']} prompt tokens" in err


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals are POSIX")
def test_the_terminal_client_at_a_terminal(server: tuple[str, Service], tmp_path: Path) -> None:
    pexpect = pytest.importorskip("pexpect")
    command = ["-m", "lmdeploy", "serve", "api_client", server[0], "--max-new-tokens", "5", "--temperature", "0"]
    child = pexpect.spawn(
        sys.executable, command, cwd=str(ROOT), encoding="utf-8", timeout=20, codec_errors="replace",
        env={**os.environ, "LMDEPLOY_CACHE": str(tmp_path), "LMDEPLOY_API_KEY": KEY, "TERM": "dumb"},
    )  # fmt: skip
    child.delaybeforesend = None
    try:
        child.expect_exact("double enter to end input >>> ")
        child.send("two\nlines\n\n")
        child.expect(r"\[\d+ prompt tokens \(\d+ cached\), [1-5] answered")
        child.expect_exact("double enter to end input >>> ")
        child.send("exit\n")
        child.expect(pexpect.EOF)
        child.wait()
        assert child.exitstatus == 0
    finally:
        child.close(force=True)


def test_a_session_that_the_server_keeps(api: APIClient, server: tuple[str, Service]) -> None:
    fields: dict[str, Any] = {"temperature": 0.0, "request_output_len": 6}
    first = list(api.chat("Where does the river run?", 5, **fields))
    assert first[-1][2] in ("stop", "length")
    assert "".join(text for text, _, _ in first)
    (second,) = api.chat_interactive_v1("And the sea?", 5, interactive_mode=True, **fields)
    assert second["history_tokens"] > second["input_tokens"] > 0
    api.end_session(5)
    (fresh,) = api.chat_interactive_v1("And the sea?", 5, interactive_mode=True, **fields)
    assert fresh["history_tokens"] == 0
    api.end_session(5)
    wait_all_free(server[1])
    assert server[1].num_active == 0
