"""Work that ends with its client's connection, and answers as server-sent events. It knows no endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lmdeploy.errors import LMDeployError
from lmdeploy.logging import get_logger
from lmdeploy.serve.errors import ClientGone, problem_of

T = TypeVar("T")


async def while_connected(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of `work`, which is cancelled when the client goes away; then ClientGone is raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, or lines of JSON. An error before the first event is raised, so that it gets its own status."""

    def __init__(self, events: AsyncGenerator[object, None], *, is_sse: bool = True) -> None:
        """events: what msgspec can encode; with is_sse framed as `data: ...` and ended by `data: [DONE]`."""
        super().__init__()
        media_type = "text/event-stream; charset=utf-8" if is_sse else "application/x-ndjson"
        self._start_headers = [
            (b"content-type", media_type.encode()),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        self._events = events
        self._encoder = msgspec.json.Encoder()
        self._frame, self._end = (b"data: %b\n\n", b"data: [DONE]\n\n") if is_sse else (b"%b\n", b"")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await while_connected(self._send_all(send), receive)

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events, None)
            await send({"type": "http.response.start", "status": 200, "headers": self._start_headers})
            try:
                if first is not None:
                    await self._send(send, self._encode(first))
                async for event in events:
                    await self._send(send, self._encode(event))
            except Exception as error:
                if not isinstance(error, LMDeployError):
                    get_logger().exception("a stream has failed")
                await self._send(send, self._encode(self._failure(error)))
            await send({"type": "http.response.body", "body": self._end, "more_body": False})

    def _failure(self, error: Exception) -> dict[str, Any]:
        """What the client gets of an error that comes once the stream has begun."""
        return problem_of(error).body()

    def _encode(self, event: object) -> bytes:
        return self._frame % self._encoder.encode(event)

    async def _send(self, send: Send, data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})


class NamedEventStream(EventStream):
    """Server-sent events that bear their `type` as the event's name, too, and have no frame at the end."""

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__(events)
        self._end = b""

    def _failure(self, error: Exception) -> dict[str, Any]:
        return {"type": "error", **problem_of(error).typed_body()}

    def _encode(self, event: object) -> bytes:
        assert isinstance(event, dict)
        return b"event: %b\n%b" % (event["type"].encode(), super()._encode(event))
