"""A server on the loopback interface, an engine in its own process, the `openai` package as its client."""

from __future__ import annotations

import asyncio
import base64
import math
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from openai.types.chat import ChatCompletionMessageParam

from lmdeploy.engine.process import ProcessClient
from lmdeploy.messages import GenerationConfig
from lmdeploy.serve.service import Service
from tests.serve.live import KEY, running

ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Where does the river run?"}]


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[tuple[str, Service]]:
    with running(tiny) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: tuple[str, Service]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key=KEY, max_retries=0, timeout=20) as client:
        yield client


def wait_all_free(service: Service) -> None:
    """Until the engine tells that every block is free again; its news come twice a second."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        stats = service.engine.client.stats()
        if stats["num_free_blocks"] == stats["num_blocks"] and not stats["num_running"] and not service.num_active:
            return
        time.sleep(0.02)
    raise AssertionError(f"blocks are still taken: {service.engine.client.stats()}")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 24, "temperature": 0, "stop": ["q"]}
    whole = client.chat.completions.create(**fields)
    assert whole.usage is not None
    assert whole.usage.completion_tokens > 0
    text, reasons, usage = "", [], None
    for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **fields):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons.append(choice.finish_reason)
    assert text == whole.choices[0].message.content
    assert reasons[-1] == whole.choices[0].finish_reason
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_seed_repeats_an_answer(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 12, "temperature": 1.5, "n": 2}
    first, again = (client.chat.completions.create(seed=5, **fields).choices for _ in range(2))
    assert [choice.message.content for choice in first] == [choice.message.content for choice in again]
    assert first[0].message.content != first[1].message.content


def test_penalties_and_biases_change_the_answer(client: openai.OpenAI, server: tuple[str, Service]) -> None:
    fields: dict[str, Any] = {"model": "tiny", "prompt": "the river", "max_tokens": 40, "temperature": 0}
    extra = {"ignore_eos": True, "skip_special_tokens": False}
    plain = client.completions.create(extra_body=extra, **fields).choices[0].text
    penalized = client.completions.create(
        frequency_penalty=2.0, presence_penalty=2.0, extra_body={**extra, "repetition_penalty": 1.5}, **fields
    )
    assert penalized.choices[0].text != plain
    token = server[1].engine.tokenizer.encode("mill", add_special_tokens=False)[0]
    forced = client.completions.create(logit_bias={str(token): 100}, logprobs=0, **fields).choices[0].logprobs
    assert forced is not None
    assert forced.tokens is not None
    assert set(forced.tokens) == {server[1].engine.tokenizer.decode([token])}


def test_logprobs_are_a_distribution(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=4, temperature=0, logprobs=True, top_logprobs=20
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    for entry in content:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 20
        assert values == sorted(values, reverse=True)
        assert entry.logprob == values[0]  # greedy
        assert 0.5 < sum(math.exp(value) for value in values) <= 1.0001


def test_scores_of_a_prompt_are_those_of_its_logits(client: openai.OpenAI, server: tuple[str, Service]) -> None:
    """What evaluation harnesses read: log-probabilities of the prompt's tokens, and whether greedy would choose them."""
    engine = server[1].engine
    ids = engine.encode("The river runs past the old mill", do_preprocess=False)
    answer = client.completions.create(
        model="tiny", prompt=[ids], max_tokens=1, echo=True, logprobs=1, temperature=0, seed=1
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    (response,) = engine.stream([(ids, GenerationConfig(max_new_tokens=0, output_logits="all"))], is_streaming=False)
    assert response.logits is not None
    expected = torch.log_softmax(response.logits, -1)
    for position, token in enumerate(ids[1:]):
        assert logprobs.token_logprobs[position + 1] == pytest.approx(expected[position, token].item(), abs=1e-3)
        best = max(logprobs.top_logprobs[position + 1].values())
        assert best == pytest.approx(expected[position].max().item(), abs=1e-3)


def test_embeddings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="tiny", input=["the river", "a mill", "the river"])
    first, other, again = (torch.tensor(item.embedding) for item in answer.data)
    assert first.norm() == pytest.approx(1.0, abs=1e-4)
    assert torch.allclose(first, again, atol=1e-4)
    assert not torch.allclose(first, other, atol=1e-2)
    packed = client.embeddings.create(model="tiny", input="the river", encoding_format="base64").data[0].embedding
    decoded = torch.frombuffer(bytearray(base64.b64decode(str(packed))), dtype=torch.float32)
    assert torch.allclose(decoded, first, atol=1e-4)


def test_errors_are_those_of_the_package(client: openai.OpenAI, server: tuple[str, Service]) -> None:
    def ask(**fields: Any) -> None:
        client.chat.completions.create(**{"model": "tiny", "messages": ASK, "max_tokens": 1, **fields})

    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="gpt-4")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        ask(messages=[{"role": "user", "content": "river " * 2000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask(temperature=9)
    with pytest.raises(openai.BadRequestError, match="9 answers"):
        ask(n=9)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server[0]}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_full_queue(client: openai.OpenAI, server: tuple[str, Service]) -> None:
    fields: dict[str, Any] = {"model": "tiny", "prompt": "the river", "extra_body": {"ignore_eos": True}}
    with client.completions.create(stream=True, n=8, max_tokens=400, **fields) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(max_tokens=1, **fields)
        assert full.value.response.headers["retry-after"] == "1"
    wait_all_free(server[1])
    assert client.completions.create(max_tokens=1, **fields).usage is not None


@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_closed_connection_frees_its_blocks(server: tuple[str, Service], is_streaming: bool) -> None:
    url, service = server
    body = {
        "model": "tiny",
        "prompt": "the river",
        "max_tokens": 450,
        "n": 4,
        "ignore_eos": True,
        "stream": is_streaming,
    }

    async def break_off() -> None:
        async with httpx2.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}) as client:
            asking = asyncio.create_task(client.post(f"{url}/v1/completions", json=body))
            while not service.num_active:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(break_off())
    started = time.monotonic()
    wait_all_free(service)
    assert time.monotonic() - started < 2.0


def test_health_is_quick_while_the_engine_works(client: openai.OpenAI, server: tuple[str, Service]) -> None:
    fields: dict[str, Any] = {"model": "tiny", "prompt": "the river", "extra_body": {"ignore_eos": True}}
    with client.completions.create(stream=True, n=4, max_tokens=400, **fields) as stream, httpx2.Client() as plain:
        next(iter(stream))
        times = []
        for _ in range(20):
            started = time.monotonic()
            assert plain.get(f"{server[0]}/health").status_code == 200
            times.append(time.monotonic() - started)
    assert sorted(times)[10] < 0.05


def test_health_tells_of_the_engines_death(tiny: Path) -> None:
    with running(tiny) as (url, service), httpx2.Client(timeout=5) as plain:
        assert plain.get(f"{url}/health").status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            fields: dict[str, Any] = {"model": "tiny", "prompt": "the river", "extra_body": {"ignore_eos": True}}
            stream = client.completions.create(stream=True, max_tokens=400, **fields)
            next(iter(stream))
            assert isinstance(service.engine.client, ProcessClient)
            service.engine.client.process.kill()
            killed = time.monotonic()
            with pytest.raises(openai.APIError, match="the engine has stopped"):
                for _ in stream:
                    pass
            while plain.get(f"{url}/health").status_code == 200:
                time.sleep(0.01)
            assert time.monotonic() - killed < 2.0
            assert plain.get(f"{url}/health/ready").status_code == 503
            assert plain.get(f"{url}/health/live").status_code == 200
            with pytest.raises(openai.InternalServerError) as dead:
                client.completions.create(max_tokens=1, **fields)
            assert dead.value.status_code == 503


@pytest.mark.skipif(sys.platform == "win32", reason="signals that stop a process")
def test_every_waiting_request_hears_of_the_engines_death(tiny: Path) -> None:
    more = {"model": "tiny", "max_tokens": 400}
    said = {"messages": [{"role": "user", "content": "the river"}], **more}
    asked = {
        "/v1/completions": {"prompt": "the river", **more},
        "/v1/chat/completions": said,
        "/v1/messages": said,
        "/v1/responses": {"model": "tiny", "input": "the river"},
    }
    with running(tiny) as (url, service), ThreadPoolExecutor(8) as threads:
        client = service.engine.client
        assert isinstance(client, ProcessClient)
        client.process.send_signal(signal.SIGSTOP)  # so that none is answered before

        def ask(path: str, is_streaming: bool) -> httpx2.Response:
            headers = {"Authorization": f"Bearer {KEY}"}
            return httpx2.post(url + path, json={**asked[path], "stream": is_streaming}, headers=headers, timeout=20)

        waiting = [threads.submit(ask, path, is_streaming) for path in asked for is_streaming in (False, True)]
        deadline = time.monotonic() + 20
        while service.num_routed < len(waiting) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert service.num_routed == len(waiting)
        client.process.kill()
        killed = time.monotonic()
        answers = [one.result() for one in waiting]
        assert time.monotonic() - killed < 2.0
        for answer in answers:
            assert answer.status_code == 503, answer.text
            assert answer.json()["error"]["message"].startswith("the engine has stopped")
            assert answer.json()["error"]["type"] in ("service_unavailable", "overloaded_error")
        assert (service.num_active, service.num_routed, service.num_tokens) == (0, 0, 0)
