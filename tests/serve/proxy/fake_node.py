"""Servers that behave as a test scripts it, on the loopback interface, in an event loop of their own thread."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any


@dataclass
class Received:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Reply:
    """What a script does with a connection. `gone` is set when the other side closes it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def whole(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers})
        await self._write(data)

    async def begin(self, media_type: str = "text/event-stream; charset=utf-8", status: int = 200, **more: str) -> None:
        await self._head(status, {"Content-Type": media_type, "Transfer-Encoding": "chunked", **more})

    async def chunk(self, data: bytes) -> None:
        await self._write(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        await self._write(b"0\r\n\r\n")

    async def partial(self, data: bytes, length: int) -> None:
        """Some of a body that was announced to be longer."""
        await self._head(200, {"Content-Type": "application/json", "Content-Length": str(length)})
        await self._write(data)

    def die(self) -> None:
        """What a client sees of a process that is killed."""
        self._writer.transport.abort()

    async def wait_gone(self) -> None:
        while await self._reader.read(1):
            pass

    async def _head(self, status: int, headers: dict[str, str]) -> None:
        lines = [f"HTTP/1.1 {status} X", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
        await self._write(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def _write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()


Script = Callable[[Received, Reply], Awaitable[None]]


async def answer(received: Received, reply: Reply) -> None:
    await reply.whole({"echo": received.path})


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def stop(self) -> None:
        async def cancel_all() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)


class FakeNode:
    """models: what GET /v1/models tells. health: the status of GET /health, None for silence. requests: all POSTs."""

    def __init__(self, loop: Loop, script: Script = answer, models: tuple[str, ...] = ("m",)) -> None:
        self.script = script
        self.models = models
        self.health: int | None = 200
        self.received: list[Received] = []
        self.all_paths: list[str] = []
        self._loop = loop
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, again on the same port after `kill`."""

        async def listen() -> asyncio.Server:
            return await asyncio.start_server(self._serve, "127.0.0.1", self.port)

        self._server = self._loop.run(listen())
        assert self._server is not None
        self.port = self._server.sockets[0].getsockname()[1]

    def kill(self) -> None:
        """Every connection breaks and nobody listens any more."""

        async def kill() -> None:
            if self._server is not None:
                self._server.close()
                self._server = None
            for writer in list(self._writers):
                writer.transport.abort()

        self._loop.run(kill())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().strip().split("\r\n")
                headers = {line.split(":", 1)[0].lower(): line.split(":", 1)[1].strip() for line in lines}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split(" ")
                self.all_paths.append(f"{method} {path}")
                await self._answer(method, Received(path, headers, body), Reply(reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, method: str, received: Received, reply: Reply) -> None:
        if received.path == "/health":
            if self.health is None:
                await asyncio.sleep(60)
            await reply.whole({}, self.health or 200)
        elif received.path == "/v1/models":
            await reply.whole({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})
        elif method == "GET":
            await reply.whole({"path": received.path})
        else:
            self.received.append(received)
            await self.script(received, reply)
