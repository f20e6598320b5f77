"""Nodes that die: what is retried, how a broken stream ends, when a node is asked again or forgotten."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from tests.serve.proxy.conftest import BODY, wait_for
from tests.serve.proxy.fake_node import Received, Reply


async def dies_at_once(received: Received, reply: Reply) -> None:
    reply.die()


async def dies_after_its_headers(received: Received, reply: Reply) -> None:
    await reply.begin()
    await asyncio.sleep(0.02)
    reply.die()


async def dies_amid_a_short_answer(received: Received, reply: Reply) -> None:
    await reply.partial(b'{"echo"', 100)
    await asyncio.sleep(0.02)
    reply.die()


async def says_503(received: Received, reply: Reply) -> None:
    await reply.whole({"error": {"message": "the engine has stopped"}}, 503, Retry_After="5")


async def waits(received: Received, reply: Reply) -> None:
    await asyncio.sleep(30)


DEATHS = (dies_at_once, dies_after_its_headers, dies_amid_a_short_answer, says_503)


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_death_before_the_first_byte_is_not_seen(proxy: Any, node: Any, death: Any, is_streaming: bool) -> None:
    running, bad, good = proxy(strategy="random"), node(death), node()
    running.add(bad, good)
    for _ in range(20):
        answer = running.chat(stream=is_streaming)
        assert (answer.status_code, answer.json()) == (200, {"echo": "/v1/chat/completions"})
    assert len(good.received) == 20
    assert 1 <= len(bad.received) <= 6  # then it is passed over; a broken connection is tried twice
    assert running.states()[bad.url] == "open"
    assert running.metric("retries_total") >= 1


def test_many_requests_while_a_node_is_killed(proxy: Any, node: Any) -> None:
    async def slow(received: Received, reply: Reply) -> None:
        await asyncio.sleep(0.05)
        await reply.whole({"number": received.json["number"]})

    running, nodes = proxy(), [node(slow) for _ in range(3)]
    running.add(*nodes)
    with ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(running.chat, number=number) for number in range(240)]
        wait_for(lambda: len(nodes[0].received) >= 10)
        nodes[0].kill()
        done = [answer.result() for answer in answers]
    assert [answer.status_code for answer in done] == [200] * 240
    assert [answer.json()["number"] for answer in done] == list(range(240))
    assert running.states()[nodes[0].url] == "open"


@pytest.mark.parametrize("max_attempts", [1, 2, 3])
def test_attempts_are_bounded(proxy: Any, node: Any, max_attempts: int) -> None:
    running, nodes = proxy(max_attempts=max_attempts), [node(dies_after_its_headers) for _ in range(5)]
    running.add(*nodes)
    answer = running.chat()
    assert (answer.status_code, answer.json()["error_code"]) == (503, 10401)
    assert sum(len(one.received) for one in nodes) == max_attempts


def test_when_no_node_can_the_client_hears_the_nodes_own_word(proxy: Any, node: Any) -> None:
    running, nodes = proxy(), [node(says_503), node(says_503)]
    running.add(*nodes)
    answer = running.chat()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["message"] == "the engine has stopped"
    assert [len(one.received) for one in nodes] == [1, 1]


def breaks_after(*chunks: bytes, media_type: str = "text/event-stream") -> Any:
    async def script(received: Received, reply: Reply) -> None:
        await reply.begin(media_type)
        for chunk in chunks:
            await reply.chunk(chunk)
            await asyncio.sleep(0.02)
        reply.die()

    return script


def sent(data: str) -> dict[str, Any]:
    return dict(json.loads(data.removeprefix("data: ")))


def test_a_broken_stream_ends_with_an_error(proxy: Any, node: Any) -> None:
    running = proxy()
    running.add(node(breaks_after(b"data: 1\n\n", b'data: {"half')), node(breaks_after(b"data: 1\n\ndata: 2")))
    for _ in range(4):
        first, error, done, nothing = running.chat(stream=True).text.split("\n\n")
        assert (first, done, nothing) == ("data: 1", "data: [DONE]", "")
        assert sent(error)["error"]["type"] == "service_unavailable"
        assert sent(error)["error_code"] == 10401
    assert running.metric("streams_broken_total") == 4


def test_each_interface_has_its_own_form_of_error(proxy: Any, node: Any) -> None:
    running = proxy(failure_threshold=10)
    running.add(node(breaks_after(b"event: x\ndata: {}\n\n")))
    for path in ("/v1/messages", "/v1/responses"):
        _, event, _ = running.post(path, BODY).text.split("\n\n")
        name, data = event.split("\n")
        assert (name, sent(data)["type"]) == ("event: error", "error")
        message = sent(data)["error"]["message"] if path == "/v1/messages" else sent(data)["message"]
        assert "failed midway" in message


def test_lines_of_json_end_with_a_line(proxy: Any, node: Any) -> None:
    running = proxy()
    running.add(node(breaks_after(b'{"text":"a"}\n', media_type="application/x-ndjson")))
    first, last, nothing = running.post("/v1/chat/interactive", BODY).text.split("\n")
    assert (first, nothing) == ('{"text":"a"}', "")
    assert json.loads(last)["error"]["code"] == 503


def test_a_body_without_a_form_for_errors_is_left_without_an_end(proxy: Any, node: Any) -> None:
    running = proxy()
    running.add(node(breaks_after(b"abc", media_type="application/octet-stream")))
    with pytest.raises(httpx2.RemoteProtocolError):
        running.chat()
    assert running.metric("streams_broken_total") == 1


def test_a_node_is_asked_again_once_it_answers_probes(proxy: Any, node: Any) -> None:
    running, target = proxy(heartbeat_interval_s=0.1), node()
    running.add(target)
    assert running.chat().status_code == 200
    target.kill()
    answer = running.chat()
    assert (answer.status_code, answer.json()["error_code"]) == (503, 10401)
    assert running.states() == {target.url: "open"}
    assert running.chat().status_code == 503
    assert running.client.get("/health/ready").status_code == 503
    assert running.client.get("/health").status_code == 200
    target.start()
    wait_for(lambda: running.states() == {target.url: "half_open"})
    assert running.chat().status_code == 200
    assert running.states() == {target.url: "closed"}


def test_a_node_on_trial_gets_one_request_while_there_are_others(proxy: Any, node: Any) -> None:
    running, slow, good = proxy(strategy="random", heartbeat_interval_s=0.1), node(waits), node()
    running.add(slow, good)
    registered = running.proxy.registry.nodes[slow.url]
    registered.breaker.fail(is_fatal=True)
    wait_for(lambda: registered.breaker.state == "half_open")
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(running.chat) for _ in range(40)]
        wait_for(lambda: len(good.received) == 39)
        assert len(slow.received) == 1
        slow.kill()
        assert [answer.result().status_code for answer in answers] == [200] * 40
    assert registered.breaker.state == "open"


def test_what_waits_for_a_node_that_falls_silent_goes_elsewhere(proxy: Any, node: Any) -> None:
    """Its connections stay open, as those of a machine without power do: only the heartbeat tells."""

    async def begins(received: Received, reply: Reply) -> None:
        if received.json.get("stream"):
            await reply.begin()
            await reply.chunk(b"data: 1\n\n")
        await asyncio.sleep(30)

    running, silent = proxy(heartbeat_interval_s=0.1, failure_threshold=2), node(begins)
    running.add(silent)
    with ThreadPoolExecutor(2) as pool:
        waiting, begun = pool.submit(running.chat), pool.submit(running.chat, stream=True)
        wait_for(lambda: len(silent.received) == 2)
        running.add(node())
        silent.health = 500
        assert waiting.result().json() == {"echo": "/v1/chat/completions"}
        assert "failed midway" in begun.result().text


def test_a_node_that_stays_silent_is_forgotten(proxy: Any, node: Any) -> None:
    running, target, other = proxy(heartbeat_interval_s=0.1, heartbeat_expiration_s=0.3), node(), node(models=("o",))
    running.add(target, other)
    target.health = 500
    wait_for(lambda: list(running.states()) == [other.url])
    answer = running.chat()
    assert (answer.status_code, answer.json()["error_code"]) == (404, 10400)
    target.health = 200
    running.add(target)
    assert running.chat().status_code == 200
