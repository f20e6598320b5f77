"""A small HTTP/1.1 client for load: kept-alive connections, bodies handed on as they arrive. It knows no API.

A general client spends several times as much of a core on each chunk of a stream, which would then be measured, too.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from lmdeploy.errors import ConfigError

OnBody = Callable[[bytes, float], None]
_MAX_HEAD_BYTES = 64 << 10


class ConnectionBroken(Exception):
    """The connection ended or made no sense before the answer was whole. is_unused: not a byte of it had come."""

    def __init__(self, message: str, is_unused: bool = False) -> None:
        super().__init__(message)
        self.is_unused = is_unused


@dataclass(frozen=True)
class Address:
    """Where a server listens. prefix: of every path, without a slash at its end."""

    host: str
    port: int
    is_tls: bool
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises ConfigError for what is no http or https address."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r} is no address: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no address; write for example http://127.0.0.1:23333")
        is_tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if is_tls else 80), is_tls, prefix)

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class HttpClient:
    """Connections to one server: one request at a time on each, as many as there are requests at once."""

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        self.address = Address.parse(url)
        self._idle: list[_Connection] = []
        fields = {"Host": self.address.authority, "Accept": "*/*", **(headers or {})}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())

    async def request(self, method: str, path: str, body: bytes, on_body: OnBody) -> int:
        """The status; on_body(data, when) gets the body in pieces, `when` by time.perf_counter.

        Raises OSError where there is no connection, ConnectionBroken where it breaks. Cancelling closes it.
        """
        length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        data = f"{method} {self.address.prefix}{path} HTTP/1.1\r\n{self._head}{length}\r\n".encode() + body
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                try:
                    return await self._exchange(connection, data, on_body)
                except ConnectionBroken as error:  # the server may close what is idle at any time
                    if not error.is_unused:
                        raise
        return await self._exchange(await self._connect(), data, on_body)

    async def _connect(self) -> _Connection:
        loop, address = asyncio.get_running_loop(), self.address
        context = ssl.create_default_context() if address.is_tls else None
        _, connection = await loop.create_connection(_Connection, address.host, address.port, ssl=context)
        return connection

    async def _exchange(self, connection: _Connection, data: bytes, on_body: OnBody) -> int:
        try:
            status = await connection.exchange(data, on_body)
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return status

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        await asyncio.sleep(0)  # the transports close in the loop's next turn


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.is_open = False
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[int] | None = None
        self._parser = AnswerParser(lambda data, when: None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.is_open = transport, True

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._done.done():  # nobody asked: the connection is of no use any more
            self.close()
            return
        try:
            self._parser.feed(data, time.perf_counter())
        except ValueError as error:
            self._done.set_exception(ConnectionBroken(str(error)))
            return
        if self._parser.is_complete:
            self._done.set_result(self._parser.status)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._done is None or self._done.done():
            return
        if self._parser.ends_with_connection and error is None:
            self._done.set_result(self._parser.status)
        else:
            message = f"the connection was lost: {error}" if error else "the connection was closed"
            self._done.set_exception(ConnectionBroken(message, is_unused=self._parser.is_unused))

    async def exchange(self, data: bytes, on_body: OnBody) -> int:
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._parser = AnswerParser(on_body)
        self._transport.write(data)
        status = await self._done
        if not self._parser.is_kept_alive:
            self.close()
        return status

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            with suppress(OSError):
                self._transport.abort()


class AnswerParser:
    """One answer of HTTP/1.x, fed as it arrives. `feed` raises ValueError for what is none."""

    def __init__(self, on_body: OnBody) -> None:
        self.status = 0
        self.is_unused = True
        self.is_complete = False
        self.is_kept_alive = True
        self.ends_with_connection = False
        self._on_body = on_body
        self._pending = bytearray()
        self._is_chunked = False
        self._left = 0  # bytes of the body, or of the chunk and the line's end after it
        self._is_trailer = False

    def feed(self, data: bytes, when: float) -> None:
        self.is_unused = False
        self._pending += data
        if not self.status and not self._read_head():
            return
        if self._is_chunked:
            self._read_chunks(when)
            return
        part = bytes(self._pending if self.ends_with_connection else self._pending[: self._left])
        self._pending.clear()
        if part:
            self._on_body(part, when)
        self._left -= len(part)
        self.is_complete = not self.ends_with_connection and self._left == 0

    def _read_head(self) -> bool:
        """Take the head off what is pending; False while it is not whole. Interim answers (1xx) are skipped."""
        while (end := self._pending.find(b"\r\n\r\n")) >= 0:
            lines = bytes(self._pending[:end]).decode("latin-1").split("\r\n")
            del self._pending[: end + 4]
            version, _, rest = lines[0].partition(" ")
            if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
                raise ValueError(f"not an answer of HTTP/1.1: {lines[0][:80]!r}")
            status = int(rest[:3])
            if status >= 200:
                self.status = status
                self._read_fields(version, lines[1:])
                return True
        if len(self._pending) > _MAX_HEAD_BYTES:
            raise ValueError("the answer's head is too long")
        return False

    def _read_fields(self, version: str, lines: list[str]) -> None:
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._is_chunked = fields.get("transfer-encoding", "").lower() == "chunked"
        length = fields.get("content-length", "0" if self.status in (204, 304) else "")
        if length and not length.isdigit():
            raise ValueError(f"Content-Length: {length[:80]!r}")
        self.ends_with_connection = not self._is_chunked and not length
        self._left = 0 if self._is_chunked else int(length or 0)
        closes = "close" in fields.get("connection", "").lower() or version == "HTTP/1.0"
        self.is_kept_alive = not closes and not self.ends_with_connection

    def _read_chunks(self, when: float) -> None:
        pending = self._pending
        while True:
            if self._left:
                if len(pending) < self._left:
                    return
                self._on_body(bytes(pending[: self._left - 2]), when)
                del pending[: self._left]
                self._left = 0
            if (end := pending.find(b"\r\n")) < 0:
                return
            line = bytes(pending[:end])
            del pending[: end + 2]
            if self._is_trailer:
                if not line:
                    self.is_complete = True
                    return
                continue
            try:
                size = int(line.split(b";")[0], 16)
            except ValueError as error:
                raise ValueError(f"not the size of a chunk: {line[:80]!r}") from error
            self._is_trailer = size == 0
            self._left = size + 2 if size else 0
