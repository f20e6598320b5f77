"""A server of HTTP/1.1 over plain sockets whose answers a test writes itself, byte for byte and pause by pause."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

Answer = Callable[[str, dict[str, Any]], AsyncIterator[bytes | None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(**fields: Any) -> bytes:
    return chunk(b"data: " + json.dumps(fields).encode() + b"\n\n")


def piece(text: str) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}}])


def end(prompt_tokens: int, completion_tokens: int) -> bytes:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return event(choices=[], usage=usage) + chunk(b"data: [DONE]\n\n") + chunk(b"")


def whole(status: int, body: Any) -> bytes:
    data = json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(data)) + data


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """The address of a server in a thread. answer(path, body) yields what is sent; None cuts the connection off."""
    loop = asyncio.new_event_loop()
    started: list[int] = []
    ready, stop = threading.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                sizes = [int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length")]
                body = json.loads(await reader.readexactly(sizes[0])) if sizes else {}
                async for data in answer(lines[0].split()[1], body):
                    if data is None:
                        writer.transport.abort()
                        return
                    writer.write(data)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        started.append(server.sockets[0].getsockname()[1])
        ready.set()
        await stop.wait()
        server.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    ready.wait()
    try:
        yield f"http://127.0.0.1:{started[0]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
