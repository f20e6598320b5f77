"""/v1/chat/interactive: what was said is remembered, within bounds and apart from others'."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lmdeploy.serve.sessions import Sessions
from tests.serve.driver import Served, break_off, endless
from tests.serve.live import KEY, running

PATH = "/v1/chat/interactive"


def ask(served: Served, prompt: str = "hello", **fields: Any) -> httpx2.Response:
    return served.post(PATH, {"prompt": prompt, "request_output_len": 4, **fields})


def prompt_of(served: Served) -> str:
    return served.engine.tokenizer.decode(served.client.requests[-1].prompt_ids, False)


def test_a_turn_has_the_old_form(serve: Any) -> None:
    body = ask(serve(endless)).json()
    assert list(body) == ["text", "tokens", "input_tokens", "history_tokens", "finish_reason"]
    assert (body["tokens"], body["history_tokens"], body["finish_reason"]) == (4, 0, "length")


def test_a_stream_is_lines_of_json(serve: Any) -> None:
    served = serve(endless)
    whole = ask(served).json()
    answer = ask(served, stream=True)
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert "".join(line["text"] for line in lines) == whole["text"]
    assert lines[-1] == {**whole, "text": lines[-1]["text"]}


def test_sampling_defaults_are_the_old_ones(serve: Any) -> None:
    served = serve(endless)
    ask(served)
    sampling = served.client.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.8, 0.8, 40)
    ask(served, top_k=3, temperature=0.1, stop=["zz"])
    assert served.client.requests[-1].sampling.top_k == 3


def test_a_session_remembers_and_ends(serve: Any) -> None:
    served = serve(endless)
    first = ask(served, "one", session_id=7, interactive_mode=True).json()
    second = ask(served, "two", session_id=7, interactive_mode=True).json()
    assert prompt_of(served).index("one") < prompt_of(served).index("two")
    assert second["history_tokens"] == first["input_tokens"] + first["tokens"]
    ask(served, "three", session_id=8, interactive_mode=True)
    assert "one" not in prompt_of(served)
    ask(served, "four", session_id=7)  # not interactive: neither remembers nor adds
    assert "one" not in prompt_of(served)
    assert ask(served, "", session_id=7, request_output_len=0).json()["finish_reason"] is None
    ask(served, "five", session_id=7, interactive_mode=True)
    assert "two" not in prompt_of(served)


def test_sessions_of_different_keys_are_apart(serve: Any) -> None:
    served = serve(endless, api_keys=("a", "b"))
    for key, prompt in (("a", "mine"), ("b", "other")):
        body = {"prompt": prompt, "session_id": 1, "interactive_mode": True, "request_output_len": 2}
        assert served.post(PATH, body, headers={"x-api-key": key}).status_code == 200
    assert "mine" not in prompt_of(served)


def test_a_turn_broken_off_is_kept_as_far_as_it_came(serve: Any) -> None:
    served = serve(endless)
    body = {"prompt": "one", "session_id": 3, "interactive_mode": True, "request_output_len": 150, "stream": True}
    asyncio.run(break_off(served, PATH, body, num_messages=4, num_requests=1))
    assert served.client.wait_idle()
    ask(served, "two", session_id=3, interactive_mode=True)
    assert prompt_of(served).count("<|im_start|>assistant") == 2


@pytest.mark.parametrize("fields", [{"cancel": True}, {"stop": True}])
def test_cancel_ends_the_answer_in_work(serve: Any, fields: dict[str, Any]) -> None:
    served = serve(endless, client={"session_len": 1 << 20})
    body = {
        "prompt": "one",
        "session_id": 3,
        "interactive_mode": True,
        "request_output_len": 1 << 19,
        "ignore_eos": True,
    }

    async def run() -> tuple[httpx2.Response, httpx2.Response, httpx2.Response]:
        transport = httpx2.ASGITransport(served.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=20) as client:
            asking = asyncio.create_task(client.post(PATH, json=body))
            while not served.client.requests:
                await asyncio.sleep(0.005)
            busy = await client.post(PATH, json=body)
            cancelled = await client.post(PATH, json={"session_id": 3, **fields})
            return await asking, busy, cancelled

    answer, busy, cancelled = asyncio.run(run())
    assert answer.json()["finish_reason"] == "abort"
    assert busy.status_code == 400
    assert "session 3" in busy.json()["message"]
    assert cancelled.json()["tokens"] == 0
    assert served.service.num_active == 0


def test_what_is_not_there_is_refused(serve: Any) -> None:
    served = serve(endless)
    assert ask(served, image_url="http://x/y.png").status_code == 400
    assert ask(served, n=2).status_code == 400
    assert ask(served, adapter_name="x").status_code == 400


def test_sessions_are_bounded() -> None:
    sessions = Sessions(max_sessions=2, max_bytes=500)
    for number in range(3):
        conversation = sessions.begin("", number)
        assert conversation.said == []
        sessions.end("", number, conversation, [{"role": "user", "content": str(number)}], 5)
    assert len(sessions) == 2
    forgotten = sessions.begin("", 0)
    assert forgotten.said == []
    sessions.end("", 0, forgotten, [], 0)
    kept = sessions.begin("", 2)
    assert kept.said == [{"role": "user", "content": "2"}]
    sessions.end("", 2, kept, [{"role": "user", "content": "x" * 600}], 5)
    assert len(sessions) == 0
    sessions.end("", 2, kept, [], 0)  # of a turn whose session has gone meanwhile
    assert len(sessions) == 0


def test_the_cache_keeps_what_was_said(tiny: Path) -> None:
    text = "The river runs past the old mill and under the bridge to the sea."
    body = {"session_id": 1, "interactive_mode": True, "request_output_len": 2, "ignore_eos": True}
    with running(tiny) as (url, service), httpx2.Client(headers={"x-api-key": KEY}, timeout=20) as client:
        for prompt in (text, "And then?"):
            assert client.post(f"{url}{PATH}", json={"prompt": prompt, **body}).json()["tokens"] == 2
        text = client.get(f"{url}/metrics").text
        (cached,) = [line for line in text.splitlines() if line.startswith("lmdeploy:cached_tokens_total")]
        assert float(cached.split()[-1]) >= 16
        assert len(service.sessions) == 1
