"""Requests through a running proxy: what goes on unchanged, what does not, streams, errors of the nodes."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import httpx2
import pytest

from lmdeploy.serve.proxy.app import FORWARDED
from lmdeploy.serve.proxy.routing import STRATEGIES
from tests.cli.command_line import ROOT
from tests.serve.driver import error_of
from tests.serve.proxy.conftest import BODY, wait_for
from tests.serve.proxy.fake_node import Received, Reply


def named(name: str) -> Any:
    async def answer(received: Received, reply: Reply) -> None:
        await reply.whole({"node": name})

    return answer


def test_models_of_all_nodes(proxy: Any, node: Any) -> None:
    running = proxy()
    assert running.client.get("/v1/models").json() == {"object": "list", "data": []}
    running.add(node(models=("a", "b")), node(models=("b", "c")))
    assert [card["id"] for card in running.client.get("/v1/models").json()["data"]] == ["a", "b", "c"]
    assert running.client.get("/v1/models/b").json()["id"] == "b"
    assert running.client.get("/v1/models/d").status_code == 404


@pytest.mark.parametrize("path", FORWARDED)
def test_requests_go_to_a_node_of_their_model(proxy: Any, node: Any, path: str) -> None:
    running = proxy()
    running.add(node(named("a"), models=("a", "both")), node(named("b"), models=("b", "both")))
    for model, nodes in (("a", {"a"}), ("b", {"b"}), ("both", {"a", "b"})):
        answer = running.post(path, {"model": model, "input": "x"})
        assert answer.status_code == 200
        assert answer.json()["node"] in nodes


def test_the_body_and_the_headers_arrive_as_they_were(proxy: Any, node: Any) -> None:
    async def script(received: Received, reply: Reply) -> None:
        more = {
            "X_Kept": "yes",
            "Connection": "X-Dropped",
            "X_Dropped": "1",
            "Keep_Alive": "timeout=3",
            "Date": "then",
            "Retry_After": "7",
        }
        await reply.whole(b'{ "odd":  1.0e0 }', 201, **more)

    running, target = proxy(), node(script)
    running.add(target)
    body = b'{"model":"m",  "seed": 1e0, "text": "\\u00e9\xc3\xa9"}'
    headers = {
        "Content-Type": "application/json; charset=utf-8", "Authorization": "Bearer k", "X-Mine": "1", "TE": "trailers",
        "Connection": "keep-alive, X-Hop", "X-Hop": "1", "Accept-Encoding": "br;q=0.5", "Cookie": "a=b",
    }  # fmt: skip
    answer = running.client.post("/v1/completions", content=body, headers=headers)
    (received,) = target.received
    assert received.body == body
    seen = received.headers
    assert (seen["x-mine"], seen["authorization"], seen["accept-encoding"]) == ("1", "Bearer k", "br;q=0.5")
    assert (seen["host"], seen["cookie"]) == (target.url.removeprefix("http://"), "a=b")
    assert not {"te", "x-hop", "transfer-encoding", "expect"} & set(seen)
    assert (answer.status_code, answer.content) == (201, b'{ "odd":  1.0e0 }')
    assert (answer.headers["x-kept"], answer.headers["retry-after"]) == ("yes", "7")
    assert not {"x-dropped", "keep-alive"} & set(answer.headers)
    assert len(answer.headers.get_list("date")) == 1


@pytest.mark.parametrize(
    ("status", "retry_after"), [(429, "3"), (400, None), (404, None), (500, None), (504, None), (408, None)]
)
def test_what_a_node_refuses_is_passed_on_and_not_retried(
    proxy: Any, node: Any, status: int, retry_after: str | None
) -> None:
    async def script(received: Received, reply: Reply) -> None:
        await reply.whole({"error": {"message": "no"}}, status, **({"Retry_After": retry_after} if retry_after else {}))

    running, nodes = proxy(), [node(script), node(script)]
    running.add(*nodes)
    answer = running.chat()
    assert (answer.status_code, answer.json()) == (status, {"error": {"message": "no"}})
    assert answer.headers.get("retry-after") == retry_after
    assert sum(len(one.received) for one in nodes) == 1


def test_a_stream_is_passed_on_as_it_comes(proxy: Any, node: Any) -> None:
    """Each event is with the client before the node makes the next one."""
    turns = [threading.Event() for _ in range(5)]

    async def script(received: Received, reply: Reply) -> None:
        await reply.begin()
        for number, turn in enumerate(turns):
            await asyncio.to_thread(turn.wait, 10)
            await reply.chunk(b"data: %d\n\n" % number)
        await reply.chunk(b"data: [DONE]\n\n")
        await reply.end()

    running, target = proxy(), node(script)
    running.add(target)
    turns[0].set()
    with running.stream() as answer:
        pieces = answer.iter_raw()
        for number in range(5):
            assert next(pieces) == b"data: %d\n\n" % number
            if number < 4:
                turns[number + 1].set()
        assert b"".join(pieces) == b"data: [DONE]\n\n"
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"


def test_a_long_answer_arrives_whole(proxy: Any, node: Any) -> None:
    content = bytes(range(256)) * (9 << 12)  # more than is kept to be sent in one piece

    async def script(received: Received, reply: Reply) -> None:
        await reply.whole(content, Content_Encoding="zstd" if received.json["stream"] else "identity")

    running = proxy()
    running.add(node(script))
    with running.stream() as answer:
        assert b"".join(answer.iter_raw()) == content
    assert running.chat(stream=False).content == content


def test_an_unknown_model(proxy: Any, node: Any) -> None:
    running = proxy()
    running.add(node(models=("a", "b")))
    answer = running.chat(model="c")
    assert answer.status_code == 404
    body = answer.json()
    assert (body["error"]["code"], body["error_code"]) == ("model_not_found", 10400)
    assert "a, b" in body["error"]["message"]
    assert running.post("/v1/messages", {"model": "c"}).json()["error"]["type"] == "not_found_error"
    missing = running.post("/generate", {"prompt": "x"})
    assert missing.status_code == 400
    assert "a, b" in error_of(missing)["message"]


def test_an_endpoint_without_names_means_the_only_model(proxy: Any, node: Any) -> None:
    running, target = proxy(), node()
    running.add(target)
    assert running.post("/generate", {"prompt": "x"}).json() == {"echo": "/generate"}


def test_no_server(proxy: Any) -> None:
    answer = proxy().chat()
    assert (answer.status_code, answer.json()["error_code"]) == (503, 10401)
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    "body", [b"[]", b"1", b"{", b'{"model": 5}', b"\xff", b'{"a":' * 5000, b'{"model": "\\ud800"}']
)
def test_bodies_that_are_none(proxy: Any, node: Any, body: bytes) -> None:
    running, target = proxy(), node()
    running.add(target)
    answer = running.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert error_of(answer)["message"]
    assert not target.received


def test_what_is_not_forwarded(proxy: Any, node: Any) -> None:
    running, target = proxy(), node()
    running.add(target)
    for path in ("/sleep", "/update_weights", "/terminate", "/abort_request", "/metrics", "/v1/../nodes/x", "/nodes"):
        assert running.post(path, BODY).status_code in (404, 405)
    assert running.post("/v1/completions?x=1", BODY).status_code == 400
    assert running.client.get("/v1/chat/completions").status_code == 405
    assert not target.received


def test_a_client_that_goes_ends_the_nodes_work(proxy: Any, node: Any) -> None:
    gone = threading.Event()

    async def script(received: Received, reply: Reply) -> None:
        if received.json.get("stream"):
            await reply.begin()
            await reply.chunk(b"data: 1\n\n")
        await reply.wait_gone()
        gone.set()

    running = proxy()
    running.add(node(script))
    with running.stream() as answer:
        next(answer.iter_raw())
    assert gone.wait(5)
    gone.clear()
    with pytest.raises(httpx2.ReadTimeout):
        running.post("/v1/completions", BODY, timeout=0.3)
    assert gone.wait(5)
    wait_for(lambda: running.proxy.num_active == 0)
    assert running.metric("client_disconnects_total") == 2
    assert set(running.states().values()) == {"closed"}
    assert all(one.unfinished == 0 for one in running.proxy.registry.nodes.values())


def test_a_silent_node_times_out(proxy: Any, node: Any) -> None:
    async def script(received: Received, reply: Reply) -> None:
        await asyncio.sleep(5)

    running = proxy(node_timeout_s=0.2)
    target = node(script)
    running.add(target)
    answer = running.chat()
    assert (answer.status_code, answer.json()["error_code"]) == (504, 10402)
    assert len(target.received) == 1  # it would take as long a second time


def test_more_requests_than_there_may_be(proxy: Any, node: Any) -> None:
    turn = threading.Event()

    async def script(received: Received, reply: Reply) -> None:
        await asyncio.to_thread(turn.wait, 10)
        await reply.whole({})

    running = proxy(max_concurrent_requests=1)
    running.add(node(script))
    answers: list[httpx2.Response] = []
    first = threading.Thread(target=lambda: answers.append(running.chat()))
    first.start()
    wait_for(lambda: running.proxy.num_active == 1)
    full = running.chat()
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")
    turn.set()
    first.join()
    assert answers[0].status_code == 200


def test_a_proxy_that_drains_takes_nothing_new(proxy: Any, node: Any) -> None:
    turn = threading.Event()

    async def script(received: Received, reply: Reply) -> None:
        await reply.begin()
        await reply.chunk(b"data: 1\n\n")
        await asyncio.to_thread(turn.wait, 10)
        await reply.chunk(b"data: [DONE]\n\n")
        await reply.end()

    running = proxy()
    running.add(node(script))
    assert running.client.get("/health/ready").status_code == 200
    with running.stream() as answer:
        pieces = answer.iter_raw()
        next(pieces)
        running.proxy.is_draining = True
        assert running.client.get("/health/ready").status_code == 503
        assert running.chat().status_code == 503
        turn.set()
        assert b"".join(pieces) == b"data: [DONE]\n\n"


def responding(name: str) -> Any:
    """/v1/responses as a server gives it, whole or as events."""

    async def script(received: Received, reply: Reply) -> None:
        body = {"object": "response", "id": f"resp_{name}_{received.json.get('input')}"}
        if not received.json.get("stream"):
            await reply.whole(body)
            return
        await reply.begin()
        event = {"type": "response.created", "response": body}
        await reply.chunk(b"event: response.created\ndata: %b\n\n" % json.dumps(event).encode())
        await reply.end()

    return script


@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_conversation_goes_on_where_its_last_answer_is_kept(proxy: Any, node: Any, is_streaming: bool) -> None:
    running, nodes = proxy(strategy="random"), {name: node(responding(name)) for name in "abc"}
    running.add(*nodes.values())
    for number in range(12):
        first = running.post("/v1/responses", {"model": "m", "input": f"{number}", "stream": is_streaming}).text
        (name,) = (name for name in nodes if f"resp_{name}_{number}" in first)
        before = len(nodes[name].received)
        body = {"model": "m", "input": "more", "previous_response_id": f"resp_{name}_{number}"}
        assert running.post("/v1/responses", body).json()["id"] == f"resp_{name}_more"
        assert len(nodes[name].received) == before + 1
        assert running.client.get(f"/v1/responses/resp_{name}_{number}").json() == {
            "path": f"/v1/responses/resp_{name}_{number}"
        }
    assert running.client.get("/v1/responses/resp_unknown").status_code == 404
    assert running.client.delete("/v1/responses/resp_unknown").status_code == 404


def test_a_stateful_session_stays_at_its_node(proxy: Any, node: Any) -> None:
    running, nodes = proxy(strategy="random"), [node(named("a")), node(named("b")), node(named("c"))]
    running.add(*nodes)
    homes = {}
    for number in range(24):
        answers = [
            running.post("/v1/chat/interactive", {"prompt": "x", "session_id": number, "interactive_mode": True})
            for _ in range(3)
        ]
        (homes[number],) = {answer.json()["node"] for answer in answers}
    assert set(homes.values()) == {"a", "b", "c"}
    assert running.post("/v1/chat/interactive", {"prompt": "x", "session_id": -1}).status_code == 200


def test_the_page_names_every_endpoint() -> None:
    text = (ROOT / "docs" / "proxy.md").read_text(encoding="utf-8")
    assert [path for path in FORWARDED if f"`{path}`" not in text] == []
    assert [name for name in STRATEGIES if f"| `{name}` |" not in text] == []
