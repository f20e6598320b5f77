"""Both clients: answers, refusals, aborts, the engine's death, and what `close` frees."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lmdeploy.engine.client import EngineClient, ThreadClient
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.engine.process import ProcessClient
from lmdeploy.engine.request import Request, RequestOutput, SamplingParams
from lmdeploy.errors import CheckpointError, EngineDead, InvalidParameter, PromptTooLong
from tests.engine.driver import greedy, join, make_engine, run

CONFIG = EngineConfig(dtype="float32", device="cpu", cache_max_entry_count=64, block_size=16)


@pytest.fixture(scope="module", params=[ThreadClient, ProcessClient])
def client(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[EngineClient]:
    client = request.param(tiny_llama, CONFIG)
    yield client
    client.close()


def ask(client: EngineClient, *requests: Request) -> dict[str, RequestOutput]:
    """Submit all, wait for all, join each request's outputs."""
    news: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    for request in requests:
        client.submit(request, news.put)
    joined: dict[str, RequestOutput] = {}
    running = {request.request_id for request in requests}
    while running:
        output = news.get(timeout=30)
        join(joined, output)
        if output.is_finished:
            running.remove(output.request_id)
    return joined


def test_answers_equal_the_engines_own(client: EngineClient, tiny_llama: Path) -> None:
    requests = [greedy(str(i), list(range(i, i + 20)), 16, logprobs=3) for i in range(5)]
    expected = run(make_engine(tiny_llama), requests)
    actual = ask(client, *requests)
    for name, output in expected.items():
        assert actual[name].token_ids == output.token_ids
        assert actual[name].finish_reason == "length"
        assert actual[name].logprobs is not None
        assert [list(d) for d in actual[name].logprobs] == [list(d) for d in output.logprobs or []]


def test_tensors_arrive_whole(client: EngineClient, tiny_llama: Path) -> None:
    request = greedy("t", list(range(30)), 3, return_logits="all", return_hidden_states="generation")
    expected = run(make_engine(tiny_llama), [request])["t"]
    actual = ask(client, request)["t"]
    assert torch.equal(actual.logits, expected.logits)
    assert actual.hidden_states.shape == (3, expected.hidden_states.shape[1])


def test_refusals_come_at_once_and_leave_nothing(client: EngineClient) -> None:
    outputs: list[RequestOutput] = []
    with pytest.raises(PromptTooLong):
        client.submit(greedy("long", [1] * 999), outputs.append)
    with pytest.raises(InvalidParameter):
        client.submit(Request("bad", [1], SamplingParams(top_p=-1)), outputs.append)
    assert outputs == []
    assert ask(client, greedy("long", [1, 2]))["long"].finish_reason == "length"


def test_abort_ends_a_request(client: EngineClient) -> None:
    news: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    client.submit(greedy("r", [1, 2], 200), news.put)
    news.get(timeout=30)
    client.abort("r")
    while not (output := news.get(timeout=30)).is_finished:
        pass
    assert output.finish_reason == "abort"


def test_a_failing_receiver_loses_only_its_own_request(client: EngineClient) -> None:
    def fail(output: RequestOutput) -> None:
        raise ValueError("a broken receiver")

    client.submit(greedy("broken", [1, 2], 200), fail)
    assert len(ask(client, greedy("whole", [3, 4], 20))["whole"].token_ids) == 20


def test_many_threads_share_one_client(client: EngineClient) -> None:
    answers: dict[str, list[int]] = {}

    def work(name: str) -> None:
        for turn in range(3):
            answers[f"{name}{turn}"] = ask(client, greedy(f"{name}{turn}", [ord(name)], 5))[f"{name}{turn}"].token_ids

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 18
    assert all(answers[f"{name}0"] == answers[f"{name}2"] for name in "abcdef")


@pytest.mark.parametrize("kind", [ThreadClient, ProcessClient])
def test_close_ends_what_runs_and_refuses_the_rest(kind: type, tiny_llama: Path) -> None:
    client = kind(tiny_llama, CONFIG)
    news: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    client.submit(greedy("r", [1, 2], 250), news.put)
    client.close()
    while not (output := news.get(timeout=30)).is_finished:
        pass
    assert output.finish_reason in ("abort", "error")
    with pytest.raises(EngineDead):
        client.submit(greedy("s", [1]), news.put)
    client.close()


@pytest.mark.parametrize("kind", [ThreadClient, ProcessClient])
def test_a_load_error_is_the_callers(kind: type, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        kind(tmp_path, CONFIG)


def test_a_failing_step_tells_every_waiter(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = ThreadClient(tiny_llama, CONFIG)
    ask(client, greedy("before", [1]))

    def fail(engine: Engine) -> list[RequestOutput]:
        raise RuntimeError("a broken device")

    monkeypatch.setattr(Engine, "step", fail)
    outputs = ask(client, greedy("a", [1]), greedy("b", [2]))
    for output in outputs.values():
        assert isinstance(output.error, EngineDead)
        assert "a broken device" in str(output.error)
    with pytest.raises(EngineDead):
        client.submit(greedy("c", [1]), print)


def test_a_killed_process_tells_every_waiter(tiny_llama: Path) -> None:
    client = ProcessClient(tiny_llama, CONFIG)
    news: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    client.submit(greedy("r", [1, 2], 250), news.put)
    client.process.kill()
    while not (output := news.get(timeout=30)).is_finished:
        pass
    assert isinstance(output.error, EngineDead)
    with pytest.raises(EngineDead):
        client.submit(greedy("s", [1]), news.put)
    client.close()


def test_close_frees_the_weights(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[weakref.ref[object]] = []
    start = Engine.start_runner

    def remember(engine: Engine) -> None:
        start(engine)
        engines.extend((weakref.ref(engine.runner.model), weakref.ref(engine.runner.kv_cache.data)))

    monkeypatch.setattr(Engine, "start_runner", remember)
    client = ThreadClient(tiny_llama, CONFIG)
    ask(client, greedy("r", [1]))
    client.close()
    gc.collect()
    assert [reference() for reference in engines] == [None, None]
