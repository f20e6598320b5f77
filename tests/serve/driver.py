"""Asks an application in this process: whole answers through httpx, connections that break off through bare ASGI."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import httpx2
from fastapi import FastAPI

from lmdeploy.async_engine import AsyncEngine
from lmdeploy.engine.request import Request
from lmdeploy.serve.service import Service
from tests.fakes import FakeClient

HELLO = [{"role": "user", "content": "hello"}]


def echo(request: Request) -> Iterable[int]:
    return list(request.prompt_ids)


def endless(request: Request) -> Iterable[int]:
    return itertools.cycle(request.prompt_ids)


@dataclass
class Served:
    app: FastAPI
    engine: AsyncEngine
    client: FakeClient

    @property
    def service(self) -> Service:
        service = self.app.state.service
        assert isinstance(service, Service)
        return service

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self.ask("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        return self.ask("POST", path, json=body, **options)

    def chat(self, **fields: Any) -> httpx2.Response:
        return self.post("/v1/chat/completions", {"model": "tiny", "messages": HELLO, **fields})

    def complete(self, **fields: Any) -> httpx2.Response:
        return self.post("/v1/completions", {"model": "tiny", "prompt": "the river", **fields})

    def ask(self, method: str, path: str, **options: Any) -> httpx2.Response:
        async def ask() -> httpx2.Response:
            transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())


async def break_off(served: Served, path: str, body: Any, num_messages: int, num_requests: int) -> list[dict[str, Any]]:
    """POST, and go away once so many messages have come and so many requests have reached the engine; the messages."""
    incoming = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if (message := next(incoming, None)) is not None:
            return message
        while len(messages) < num_messages or len(served.client.requests) < num_requests:
            await asyncio.sleep(0.002)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)
        await asyncio.sleep(0)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
    }  # fmt: skip
    await asyncio.wait_for(served.app(scope, receive, send), 10)
    return messages


def events(answer: httpx2.Response) -> list[dict[str, Any]]:
    """The objects of a stream of server-sent events, which ends as it has to."""
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    frames = answer.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""], frames[-3:]
    assert all(frame.startswith("data: ") for frame in frames[:-1])
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """OpenAI's error object; LMDeploy's flat form has to say the same."""
    body = answer.json()
    error = body["error"]
    assert body == {"object": "error", **error, "error": error}
    assert isinstance(error, dict)
    return error
