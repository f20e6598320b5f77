"""Load on servers whose times and faults the test writes: the figures say what was done, the faults have names."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdeploy.bench.serving import Load, Measurement, measure
from lmdeploy.bench.serving_http import HttpClient
from lmdeploy.bench.serving_load import Target, run_closed, run_open, served_model
from lmdeploy.bench.serving_prompts import Ask, random_asks
from lmdeploy.cli import main
from lmdeploy.errors import ConfigError
from tests.bench.fake_server import HEAD, answering, chunk, end, event, piece, whole
from tests.serve.live import KEY, running
from tests.tiny_model import make_tiny_llama

ASKS = [Ask("the river", 4)] * 6
FORCED = '{"temperature": 0, "logit_bias": {"68": 100}}'  # one letter again and again: each token has a text
FIRST_S, NEXT_S = 0.08, 0.03


async def steady(path: str, body: dict[str, Any]) -> AsyncIterator[bytes | None]:
    """A role at once, the first text after FIRST_S, then one piece each NEXT_S, as many as are asked for."""
    if path == "/v1/models":
        yield whole(200, {"data": [{"id": "m"}]})
        return
    yield HEAD + event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
    await asyncio.sleep(FIRST_S)
    for number in range(body["max_tokens"]):
        yield piece(f"word{number} ")
        if number < body["max_tokens"] - 1:
            await asyncio.sleep(NEXT_S)
    yield end(7, body["max_tokens"])


def test_times_and_counts_are_the_servers() -> None:
    with answering(steady) as url:
        run = asyncio.run(run_closed(Target(url, "m", "chat"), ASKS, 3))
    assert len(run.traces) == 6
    for trace in run.traces:
        assert (trace.error, trace.prompt_tokens, trace.output_tokens, len(trace.arrivals)) == (None, 7, 4, 4)
        assert FIRST_S <= trace.arrivals[0] - trace.sent < FIRST_S + 1
        assert FIRST_S + 3 * NEXT_S <= trace.arrivals[-1] - trace.sent < FIRST_S + 3 * NEXT_S + 1
    least = 2 * (FIRST_S + 3 * NEXT_S)  # two rounds of three clients
    assert least <= run.duration_s < least + 2
    assert 0 < run.cpu_share < 1


def test_an_open_loop_does_not_wait_for_answers() -> None:
    with answering(steady) as url:
        run = asyncio.run(run_open(Target(url, "m", "chat"), ASKS * 5, 400.0, random.Random(1)))
    due = [trace.due for trace in run.traces]
    assert due == sorted(due)
    assert 0.025 < due[-1] - due[0] < 0.2  # 29 gaps of 2.5 ms on average
    assert run.traces[-1].sent < run.traces[0].ended  # all were sent before the first had ended
    assert run.duration_s < 3  # one after the other would take 5
    assert all(trace.sent >= trace.due - 0.005 for trace in run.traces)


def test_what_is_sent() -> None:
    seen: list[tuple[str, dict[str, Any]]] = []

    async def keep(path: str, body: dict[str, Any]) -> AsyncIterator[bytes | None]:
        seen.append((path, body))
        yield HEAD + event(choices=[{"index": 0, "text": "a"}]) + end(1, 1)

    with answering(keep) as url:
        for endpoint in ("chat", "completions"):
            target = Target(f"{url}/v1/", "m", endpoint, more={"ignore_eos": True})  # type: ignore[arg-type]
            run = asyncio.run(run_closed(target, [Ask("the river", 9)], 1))
            assert run.traces[0].error is None
    common = {
        "model": "m",
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    assert seen == [
        ("/v1/chat/completions", {**common, "messages": [{"role": "user", "content": "the river"}]}),
        ("/v1/completions", {**common, "prompt": "the river"}),
    ]


async def faulty(path: str, body: dict[str, Any]) -> AsyncIterator[bytes | None]:
    kind = body["messages"][0]["content"]
    if kind == "full":
        yield whole(429, {"error": {"message": "later", "type": "overloaded", "code": "queue_full"}})
    elif kind == "plain":
        yield whole(502, "bad gateway")
    elif kind == "cut early":
        yield None
    elif kind == "cut late":
        yield HEAD + piece("a")
        await asyncio.sleep(0.02)
        yield None
    elif kind == "dies":
        yield HEAD + piece("a") + event(error={"message": "dead", "type": "engine_dead"}) + chunk(b"data: [DONE]\n\n")
        yield chunk(b"")
    elif kind == "no end":
        yield HEAD + piece("a") + chunk(b"")
    elif kind == "no json":
        yield HEAD + chunk(b"data: {\n\n") + end(1, 1)
    elif kind == "no http":
        yield b"220 mail ready\r\n\r\n"
    else:
        yield HEAD + piece("a")
        await asyncio.sleep(5)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("full", "429 queue_full"),
        ("plain", "502"),
        ("cut early", "disconnected before the answer"),
        ("cut late", "disconnected"),
        ("dies", "in the stream: engine_dead"),
        ("no end", "the stream has no end"),
        ("no json", "malformed event"),
        ("no http", "disconnected before the answer"),
        ("slow", "timeout"),
    ],
)
def test_faults_have_names(kind: str, error: str) -> None:
    with answering(faulty) as url:
        run = asyncio.run(run_closed(Target(url, "m", "chat", timeout_s=0.5), [Ask(kind, 4)], 1))
    assert run.traces[0].error == error


def test_nobody_listens() -> None:
    with answering(steady) as url:
        pass
    run = asyncio.run(run_closed(Target(url, "m", "chat"), ASKS[:1], 1))
    assert run.traces[0].error == "no connection: Connection refused"
    with pytest.raises(ConfigError, match="does not answer"):
        asyncio.run(served_model(url, None))


def test_idle_connections_are_used_again_and_may_be_closed() -> None:
    async def close_after_answer(path: str, body: dict[str, Any]) -> AsyncIterator[bytes | None]:
        yield whole(200, path)
        if path == "/last":
            await asyncio.sleep(0.05)
            yield None

    async def ask(url: str) -> list[bytes]:
        client, answers = HttpClient(url), []
        for path in ("/a", "/last", "/b"):
            body = bytearray()
            assert await client.request("GET", path, b"", lambda data, _, body=body: body.extend(data)) == 200  # type: ignore[misc]
            answers.append(bytes(body))
            await asyncio.sleep(0.1 if path == "/last" else 0)
        await client.close()
        return answers

    with answering(close_after_answer) as url:
        assert asyncio.run(ask(url)) == [b'"/a"', b'"/last"', b'"/b"']


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:999999", "http://x:y"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        HttpClient(url)


def measured(urls: list[str], load: Load) -> tuple[Measurement, list[str]]:
    told: list[str] = []
    targets = [Target(url, "m", "chat") for url in urls]
    return asyncio.run(measure(targets, lambda rng: random_asks(4, 5, 3, rng), load, told.append)), told


def test_two_servers_take_turns_on_the_same_prompts() -> None:
    seen: list[tuple[str, str]] = []

    def server(name: str, factor: int) -> Any:
        async def answer(path: str, body: dict[str, Any]) -> AsyncIterator[bytes | None]:
            seen.append((name, body["messages"][0]["content"]))
            yield HEAD
            for _ in range(body["max_tokens"]):
                await asyncio.sleep(factor * 0.02)
                yield piece("a")
            yield end(5, body["max_tokens"])

        return answer

    with answering(server("fast", 1)) as fast, answering(server("slow", 3)) as slow:
        measurement, told = measured([fast, slow], Load(None, 4, rounds=2, slo={"e2e": 0.12}))
    names = [name for name, _ in seen]
    assert names == ["fast", "slow", *["fast"] * 4, *["slow"] * 8, *["fast"] * 4]  # a warm-up each, then A B B A
    rounds = [sorted(text for _, text in seen[start : start + 4]) for start in (2, 6, 10, 14)]
    assert rounds[0] == rounds[1]
    assert rounds[2] == rounds[3]
    assert rounds[0] != rounds[2]
    assert measurement.ratios is not None
    for name in ("ttft_p50_s", "tpot_p50_s", "e2e_p50_s"):
        assert 1.8 < measurement.ratios[name]["ratio"] < 3.2
    assert 0.3 < measurement.ratios["output_tok_s"]["ratio"] < 0.6
    first, second = measurement.figures
    assert (first["requests"], first["completed"], first["output_tokens"]) == (8, 8, 24)
    assert (first["slo_share"], second["slo_share"]) == (1.0, 0.0)
    assert len(told) == 4


def test_a_server_that_answers_nothing_is_told_at_once() -> None:
    async def refuse(path: str, body: dict[str, Any]) -> AsyncIterator[bytes | None]:
        yield whole(404, {"error": {"message": "no", "type": "x", "code": "model_not_found"}})

    with answering(refuse) as url, pytest.raises(ConfigError, match="answers no request: 404 model_not_found"):
        measured([url], Load(None, 4))


SMALL = ("--num-prompts", "6", "--prompt-tokens", "5", "--output-tokens", "3")


def test_the_command_prints_one_object(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "load.png"
    with answering(steady) as url:
        flags = [*SMALL, "--concurrency", "6", "--slo", "ttft=500ms,tpot=0.5s", "--plot", str(picture)]
        assert main.main(["bench", "serve", url, "--json", *flags]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    (figures,) = result["servers"]
    assert (figures["url"], figures["completed"], figures["errors"], figures["slo_share"]) == (url, 6, {}, 1.0)
    assert figures["ttft_p50_s"] >= FIRST_S
    assert figures["itl_p99_s"] >= NEXT_S
    assert (result["concurrency"], result["request_rate"], result["ratios"]) == (6, None, None)
    assert "round 1/1" in captured.err
    has_matplotlib = "no plot" not in captured.err
    assert picture.exists() == has_matplotlib
    assert not has_matplotlib or picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_compares_two(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with answering(steady) as url, answering(faulty) as other:
        started = time.monotonic()
        assert main.main(["bench", "serve", url, url, "--request-rate", "60", "--rounds", "2", *SMALL]) == 0
        text = capsys.readouterr().out
        assert "ratios of medians" in text
        assert text.count("6 of 6") == 0
        assert text.count("12 of 12 requests") == 2
        assert "TTFT" in text
        assert "of a core" in text
        assert time.monotonic() - started < 10
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text('{"prompt": "full"}\n{"messages": [{"role": "user", "content": "slow"}]}\n')
        flags = ["--model-name", "m", "--dataset", str(prompts), "--num-prompts", "2", "--timeout", "0.3"]
        assert main.main(["bench", "serve", other, "--warmup", "0", *flags]) == 1
        text = capsys.readouterr().out
        assert "failed: 1 x 429 queue_full" in text
        assert "failed: 1 x timeout" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slo", "ttft=200"], "write for example"),
        (["--slo", "speed=2s"], "write for example"),
        (["--request-rate", "2", "--concurrency", "2"], "not both"),
        (["--dataset", "/nowhere.json"], "cannot read the prompts"),
        (["--extra-body", "[1]"], "no JSON object"),
        (["--extra-body", "{"], "--extra-body is no JSON"),
        (["http://b", "http://c"], "give one server, or two"),
    ],
)
def test_mistakes_are_told(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(steady) as url:
        assert main.main(["bench", "serve", url, *flags]) == 1
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(make_tiny_llama(tmp_path_factory.mktemp("tiny"))) as (url, _):
        yield url


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_server_of_ours(endpoint: str, real_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--endpoint",
        endpoint,
        "--concurrency",
        "8",
        "--num-prompts",
        "16",
        "--api-key",
        KEY,
        "--extra-body",
        FORCED,
    ]
    assert (
        main.main(["bench", "serve", real_server, "--json", "--prompt-tokens", "9", "--output-tokens", "12", *flags])
        == 0
    )
    (figures,) = json.loads(capsys.readouterr().out)["servers"]
    assert (figures["completed"], figures["errors"], figures["output_tokens"]) == (16, {}, 16 * 12)
    assert figures["prompt_tokens"] > 16 * 9
    assert 0 < figures["ttft_p50_s"] < figures["e2e_p50_s"]
    assert 0 < figures["tpot_p50_s"] < figures["ttft_p50_s"] + 1
