"""Administration: not there unless asked for, for the administrator only; sleep and new weights on a real engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lmdeploy.serve.service import Service
from tests.serve.driver import Served, endless
from tests.serve.live import KEY, running
from tests.tiny_model import make_tiny_llama

ENDPOINTS = {
    "/sleep": "POST",
    "/wakeup": "POST",
    "/update_weights": "POST",
    "/abort_request": "POST",
    "/terminate": "GET",
}
ADMIN = {"Authorization": "Bearer the admin"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_nothing_is_there_without_the_admin_key(serve: Any, path: str) -> None:
    served = serve(endless)
    answer = served.ask(ENDPOINTS[path], path, json={"path": "x"})
    assert answer.status_code == 404
    assert path not in served.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("api_keys", [(), ("user",)])
def test_only_the_admin_key_opens_it(serve: Any, path: str, api_keys: tuple[str, ...]) -> None:
    served = serve(endless, admin_api_key="the admin", api_keys=api_keys)
    for headers in ({}, {"x-api-key": "user"}, {"Authorization": "Bearer wrong"}, {"Authorization": "the admin"}):
        answer = served.ask(ENDPOINTS[path], path, json={"path": "x", "abort_all": True}, headers=headers)
        assert answer.status_code == 401, (headers, answer.text)
    assert not served.service.is_draining
    assert not served.service.asleep


def test_flags_of_their_own_open_two_of_them(serve: Any) -> None:
    served = serve(endless, allow_terminate=True, allow_abort=True)
    assert served.post("/abort_request", {"abort_all": True}).json() == {"success": True, "num_aborted": 0}
    assert served.post("/sleep", {}).status_code == 404
    assert served.get("/terminate").status_code == 200
    assert served.get("/health/ready").status_code == 503
    assert served.chat().status_code == 503


@pytest.mark.parametrize("fields", [{"abort_all": True}, {"session_id": 5}])
def test_abort_ends_answers(serve: Any, fields: dict[str, Any]) -> None:
    served: Served = serve(endless, allow_abort=True, client={"session_len": 1 << 20})
    body = {**CHAT, "max_tokens": 1 << 19, "session_id": 5, "n": 2, "ignore_eos": True}

    async def run() -> tuple[httpx2.Response, httpx2.Response]:
        transport = httpx2.ASGITransport(served.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=20) as client:
            asking = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            while not served.client.requests:
                await asyncio.sleep(0.005)
            none = await client.post("/abort_request", json={"session_id": 6})
            assert none.json()["num_aborted"] == 0
            return await client.post("/abort_request", json=fields), await asking

    aborted, answer = asyncio.run(run())
    assert aborted.json()["num_aborted"] == 1
    assert [choice["finish_reason"] for choice in answer.json()["choices"]] == ["abort", "abort"]
    assert served.post("/abort_request", {}).status_code == 400


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    make_tiny_llama(folder / "same")
    make_tiny_llama(folder / "other", seed=1)
    make_tiny_llama(folder / "misfit", hidden_size=32)
    return folder


@pytest.fixture(scope="module")
def live(weights: Path) -> Iterator[tuple[httpx2.Client, Service]]:
    with (
        running(weights / "same", admin_api_key="the admin", weights_dir=weights) as (url, service),
        httpx2.Client(base_url=url, headers={"x-api-key": KEY}, timeout=30) as client,
    ):
        yield client, service


def admin(client: httpx2.Client, path: str, body: Any = None) -> httpx2.Response:
    return client.post(path, json=body, headers={**ADMIN, "x-api-key": "the admin"})


def text_of(client: httpx2.Client) -> str:
    answer = client.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_gives_the_cache_back_and_wakeup_restores(live: tuple[httpx2.Client, Service], level: int) -> None:
    client, _ = live
    before = text_of(client)
    assert client.get("/is_sleeping").json() == {"is_sleeping": False}
    assert admin(client, f"/sleep?level={level}").json() == {"is_sleeping": True}
    assert client.get("/health").json()["status"] == "sleeping"
    assert client.get("/health/ready").status_code == 503
    refused = client.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "sleeping")
    assert admin(client, "/wakeup?tags=kv_cache").status_code == 400  # nothing to run it yet
    assert admin(client, "/wakeup?tags=weights").json() == {"is_sleeping": True}
    assert admin(client, "/wakeup?tags=kv_cache").json() == {"is_sleeping": False}
    assert text_of(client) == before
    assert admin(client, "/sleep?level=3").status_code == 400
    assert admin(client, "/wakeup?tags=everything").status_code == 400


def test_new_weights_give_new_answers_and_no_old_prefix(live: tuple[httpx2.Client, Service]) -> None:
    client, _ = live
    before = text_of(client)
    assert admin(client, "/update_weights", {"path": "other"}).json() == {"success": True}
    answer = client.post("/v1/chat/completions", json=CHAT).json()
    assert answer["choices"][0]["message"]["content"] != before
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert admin(client, "/update_weights", {"path": "same"}).status_code == 200
    assert text_of(client) == before


@pytest.mark.parametrize("path", ["../../etc", "/etc", "no/such", "misfit", ".", "other/model.safetensors", "\x00"])
def test_weights_from_elsewhere_are_refused(live: tuple[httpx2.Client, Service], path: str) -> None:
    client, _ = live
    answer = admin(client, "/update_weights", {"path": path})
    assert answer.status_code == 400, answer.text
    assert len(answer.json()["message"]) > 20
    assert text_of(client)


def test_a_link_does_not_lead_out(live: tuple[httpx2.Client, Service], weights: Path, tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "outside", seed=2)
    (weights / "link").symlink_to(tmp_path / "outside")
    answer = admin(live[0], "/update_weights", {"path": "link"})
    assert answer.status_code == 400
    assert "--weights-dir" in answer.json()["message"]


def test_weights_that_cannot_be_read_leave_the_old_ones(live: tuple[httpx2.Client, Service], weights: Path) -> None:
    client, _ = live
    before = text_of(client)
    broken = make_tiny_llama(weights / "broken")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert admin(client, "/update_weights", {"path": "broken"}).status_code == 400
    assert text_of(client) == before


def test_sleep_aborts_what_runs(live: tuple[httpx2.Client, Service]) -> None:
    client, service = live
    body = {"model": "tiny", "prompt": "the river", "max_tokens": 450, "ignore_eos": True, "stream": True, "n": 4}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert admin(client, "/sleep").status_code == 200
        text = "\n".join(lines)
    assert text.count('"finish_reason":"abort"') + text.count('"finish_reason":"length"') == 4
    assert admin(client, "/wakeup").status_code == 200
    deadline = time.monotonic() + 5
    while service.engine.client.stats()["num_free_blocks"] != service.engine.client.stats()["num_blocks"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
