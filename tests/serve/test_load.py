"""The bounded queue, clients that go away, draining: nothing that was begun is left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from tests.serve.driver import HELLO, break_off, endless, error_of

BODIES = {
    "/v1/chat/completions": {"model": "tiny", "messages": HELLO, "ignore_eos": True},
    "/v1/completions": {"model": "tiny", "prompt": ["the river", "a mill"], "max_tokens": 200},
    "/generate": {"prompt": "the river", "max_tokens": 200},
}


async def wait_until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to pass within 5 seconds")


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_client_that_goes_away_aborts_its_answers(serve: Any, path: str, n: int, is_streaming: bool) -> None:
    if path == "/generate" and n > 1:
        n = 1
    served = serve(endless, client={"session_len": 1 << 20})
    body = {**BODIES[path], "n": n, "stream": is_streaming, "max_tokens": 100_000}
    count = n * (2 if path == "/v1/completions" else 1)
    messages = asyncio.run(break_off(served, path, body, 4 if is_streaming else 0, count))
    assert messages[0]["status"] == (200 if is_streaming else 499)
    assert served.client.wait_idle()
    asked = {request.request_id for request in served.client.requests}
    assert len(asked) == count
    assert set(served.client.aborted) == asked
    assert served.service.num_active == 0


def test_a_full_queue_refuses_and_takes_again(serve: Any) -> None:
    served = serve(endless, max_concurrent_requests=3, client={"session_len": 1 << 20})

    async def load() -> None:
        body = {**BODIES["/generate"], "stream": True, "max_tokens": 100_000}
        tasks = [asyncio.create_task(break_off(served, "/generate", body, 10**9, 0)) for _ in range(3)]
        await wait_until(lambda: len(served.client.requests) == 3)
        refused = await asyncio.to_thread(served.complete, max_tokens=1)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert error_of(refused)["code"] == "queue_full"
        streamed = await asyncio.to_thread(served.chat, stream=True)
        assert streamed.status_code == 429
        assert (await asyncio.to_thread(served.get, "/health/ready")).status_code == 200
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(load())
    assert served.client.wait_idle()
    assert served.complete(max_tokens=1).status_code == 200
    assert len(served.client.requests) == 4


def test_a_request_that_can_never_be_admitted_is_told_so(serve: Any) -> None:
    served = serve(max_concurrent_requests=3)
    answer = served.complete(prompt=["a", "b"], n=2)
    assert answer.status_code == 400
    assert "4 answers" in error_of(answer)["message"]
    assert served.complete(prompt=["a", "b", "c"]).status_code == 200
    assert served.service.num_active == 0


def test_the_default_bound_is_eight_batches(serve: Any) -> None:
    assert serve(client={"max_batch_size": 5}).service.max_active == 40


def test_one_bad_prompt_of_a_list_ends_the_others(serve: Any) -> None:
    served = serve(endless, client={"session_len": 50})
    answer = served.complete(prompt=["the river", "x " * 100], max_tokens=40)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "context_length_exceeded"
    assert served.client.wait_idle()
    assert served.service.num_active == 0


def test_draining_finishes_what_runs_and_takes_nothing_new(serve: Any) -> None:
    served = serve(endless, client={"session_len": 1 << 20})

    async def drain() -> Any:
        running = asyncio.create_task(asyncio.to_thread(served.complete, max_tokens=150))
        await wait_until(lambda: served.client.requests)
        served.service.is_draining = True
        refused = await asyncio.to_thread(served.chat, max_tokens=1)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert (await asyncio.to_thread(served.get, "/health/ready")).status_code == 503
        assert (await asyncio.to_thread(served.get, "/health")).status_code == 200
        return await running

    answer = asyncio.run(drain())
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 150


def test_the_queue_is_bounded_by_tokens_too(serve: Any) -> None:
    served = serve(endless, max_queued_tokens=60, client={"session_len": 1 << 20})
    body = {"model": "tiny", "prompt": [list(range(4, 44))], "ignore_eos": True, "max_tokens": 1 << 19}

    async def run() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(served.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=20) as client:
            asking = asyncio.create_task(client.post("/v1/completions", json=body))
            await wait_until(lambda: served.service.num_tokens == 40)
            answers = [await client.post("/v1/completions", json={**body, "max_tokens": 1})]
            answers.append(await client.post("/v1/completions", json={**body, "prompt": [[5] * 20], "max_tokens": 1}))
            served.service.abort_all()
            return [*answers, await asking]

    refused, taken, aborted = asyncio.run(run())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert "tokens" in error_of(refused)["message"]
    assert (taken.status_code, aborted.status_code) == (200, 200)
    assert (served.service.num_tokens, served.service.num_active) == (0, 0)


def test_a_request_alone_is_taken_however_long_it_is(serve: Any) -> None:
    served = serve(endless, max_queued_tokens=10)
    assert served.complete(prompt=list(range(4, 44)), max_tokens=1).status_code == 200
    many = served.complete(prompt=[[5] * 8, [6] * 8], max_tokens=1)
    assert many.status_code == 400
    assert "fewer" in error_of(many)["message"]
    assert served.service.num_tokens == 0
