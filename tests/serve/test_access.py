"""Who may ask: keys, tenants, origins, the size of a body."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from lmdeploy.serve.middleware import OPEN_PATHS
from tests.serve.driver import error_of

KEYS = ("first key", "second")
BEARER = {"Authorization": "Bearer first key"}


def test_every_path_but_health_needs_a_key(serve: Any) -> None:
    served = serve(api_keys=KEYS)
    schema = served.get("/openapi.json", headers=BEARER).json()
    paths = [*schema["paths"], "/", "/redoc", "/openapi.json", "/static-offline-docs/swagger-ui.css", "/no/such/path"]
    assert len(paths) > 15
    for path in paths:
        for method in ("GET", "POST", "DELETE"):
            answer = served.ask(method, path)
            assert (answer.status_code == 401) == (path not in OPEN_PATHS), (method, path, answer.status_code)
    pages = ["/chat", "/chat/chat.css", "/chat/chat.js"]
    assert sorted(OPEN_PATHS) == [*pages, "/health", "/health/live", "/health/ready"]


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer second key",
        "Basic second",
        "second",
        "Bearer second,second",
    ],
)
def test_wrong_keys(serve: Any, header: str | None) -> None:
    answer = serve(api_keys=KEYS).get("/v1/models", headers={} if header is None else {"Authorization": header})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert error_of(answer)["code"] == "invalid_api_key"


@pytest.mark.parametrize("header", ["Bearer first key", "bearer second"])
def test_right_keys(serve: Any, header: str) -> None:
    assert serve(api_keys=KEYS).get("/v1/models", headers={"Authorization": header}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "x/health"},
        {"X-Original-URL": "/health"},
        {"X-Forwarded-Prefix": "/health"},
        {"X-Rewrite-Url": "/health"},
    ],
)
def test_no_header_opens_another_path(serve: Any, headers: dict[str, str]) -> None:
    served = serve(api_keys=KEYS)
    for path in ("/v1/models", "/health/../v1/models", "//health", "/health/", "/HEALTH", "/health%2f..%2fv1/models"):
        assert served.get(path, headers=headers).status_code == 401


def test_websockets_get_no_answer_without_a_key(serve: Any) -> None:
    served = serve(api_keys=KEYS)
    sent: list[Any] = []

    async def connect() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "websocket", "path": "/v1/models", "headers": [], "query_string": b"", "subprotocols": []}
        await served.app({**scope, "asgi": {"version": "3.0"}, "root_path": "", "scheme": "ws"}, receive, send)

    asyncio.run(connect())
    assert sent == []


def test_each_key_has_its_own_prefix_cache(serve: Any) -> None:
    served = serve(api_keys=KEYS)
    body = {"model": "tiny", "prompt": "the river", "max_tokens": 1}
    for key in (*KEYS, KEYS[0]):
        assert served.post("/v1/completions", body, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    first, second, again = (request.cache_salt for request in served.client.requests)
    assert first == again != second
    assert KEYS[0] not in first
    open_server = serve()
    open_server.complete(max_tokens=1)
    assert open_server.client.requests[0].cache_salt == ""


def test_origins(serve: Any) -> None:
    asks = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    anywhere = serve(api_keys=KEYS)
    preflight = anywhere.ask("OPTIONS", "/v1/completions", headers=asks)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, "*")
    assert anywhere.get("/v1/models", headers={"Origin": "http://page"}).headers["access-control-allow-origin"] == "*"
    one = serve(allow_origins=("http://other",))
    assert one.ask("OPTIONS", "/v1/completions", headers=asks).status_code == 400
    assert "access-control-allow-origin" not in one.get("/v1/models", headers={"Origin": "http://page"}).headers
    none = serve(allow_origins=())
    assert none.ask("OPTIONS", "/v1/completions", headers=asks).status_code == 405


def test_the_size_of_a_body(serve: Any) -> None:
    served = serve(max_body_bytes=1000)
    assert served.complete(prompt="a", max_tokens=1).status_code == 200
    for headers in ({}, {"Content-Length": "5"}):
        answer = served.ask(
            "POST", "/v1/completions", content=b" " * 1001, headers={"Content-Type": "application/json", **headers}
        )
        assert answer.status_code == 413
        assert "1,000 bytes" in error_of(answer)["message"]


def test_a_body_that_is_announced_too_large_is_not_waited_for(serve: Any) -> None:
    served = serve(max_body_bytes=1000, body_timeout_s=60.0)

    async def never() -> Any:
        yield b"{"
        await asyncio.sleep(60)

    started = time.monotonic()
    headers = {"Content-Type": "application/json", "Content-Length": "9" * 30}
    answer = served.ask("POST", "/v1/completions", content=never(), headers=headers)
    assert answer.status_code == 413
    assert time.monotonic() - started < 10


def test_a_body_that_never_ends_is_not_waited_for(serve: Any) -> None:
    served = serve(body_timeout_s=0.05)
    sent: list[Any] = []

    async def post() -> None:
        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/generate",
            "headers": [],
            "query_string": b"",
            "root_path": "",
        }
        await served.app({**scope, "asgi": {"version": "3.0"}, "scheme": "http"}, receive, send)

    asyncio.run(asyncio.wait_for(post(), 5))
    assert sent[0]["status"] == 408
