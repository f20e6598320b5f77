"""Connections that hold a place and do not move are cut; those that do are not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI

from lmdeploy.serve.http_protocol import PatientProtocol
from lmdeploy.serve.server import Server

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
_CHUNK = b"x" * (1 << 16)


class _Hasty(PatientProtocol):
    head_timeout_s = 0.4
    stalled_timeout_s = 0.4


class _App:
    """Answers at once, slowly (/slow), or without end (/much)."""

    def __init__(self) -> None:
        self.has_ended = threading.Event()

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/slow":
            await asyncio.sleep(1.0)
        if scope["path"] == "/much":
            while not (await self._is_gone(receive)):
                await send({"type": "http.response.body", "body": _CHUNK, "more_body": True})
            self.has_ended.set()
            return
        await send({"type": "http.response.body", "body": b"done"})

    @staticmethod
    async def _is_gone(receive) -> bool:  # type: ignore[no-untyped-def]
        try:
            message = await asyncio.wait_for(receive(), 0.001)
        except asyncio.TimeoutError:
            return False
        return bool(message["type"] == "http.disconnect")


@pytest.fixture
def app() -> _App:
    return _App()


@pytest.fixture
def address(app: _App) -> Iterator[tuple[str, int]]:
    config = uvicorn.Config(app, http=_Hasty, ws="none", lifespan="off", log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    sock = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield sock.getsockname()
    server.should_exit = True
    thread.join()


def seconds_until_cut(sock: socket.socket) -> float:
    started = time.monotonic()
    sock.settimeout(10)
    with contextlib.suppress(ConnectionResetError):
        assert sock.recv(1) == b""
    return time.monotonic() - started


@pytest.mark.parametrize("sent", [b"", b"GET / HT", REQUEST[:-2]])
def test_a_head_that_does_not_come_is_not_waited_for(address: tuple[str, int], sent: bytes) -> None:
    with socket.create_connection(address) as sock:
        sock.sendall(sent)
        assert 0.2 < seconds_until_cut(sock) < 5


def test_a_head_that_drips_is_cut_too(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as sock:
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for number in range(200):
                sock.sendall(REQUEST[number : number + 1] or b"x")
                time.sleep(0.05)
        assert time.monotonic() - started < 8


def test_a_second_head_has_the_same_time(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as sock:
        sock.sendall(REQUEST)
        while not sock.recv(4096).endswith(b"0\r\n\r\n"):
            pass
        sock.sendall(b"GET / HT")
        assert seconds_until_cut(sock) < 4  # uvicorn's own timer is off by now


def test_an_answer_may_take_its_time(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as sock:
        sock.sendall(REQUEST.replace(b"GET /", b"GET /slow"))
        sock.settimeout(10)
        text = b""
        while not text.endswith(b"0\r\n\r\n"):
            data = sock.recv(4096)
            assert data, text
            text += data
        assert b"done" in text


def test_a_client_that_does_not_read_is_cut(address: tuple[str, int], app: _App) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(address)
        sock.sendall(REQUEST.replace(b"GET /", b"GET /much"))
        assert app.has_ended.wait(10)


def test_an_idle_connection_is_closed_by_its_client_first() -> None:
    """A request sent while the server closes the connection would be lost."""
    app = FastAPI()
    app.state.service = None
    expiry_s = httpx2.Limits().keepalive_expiry
    assert expiry_s is not None
    assert Server(app).config.timeout_keep_alive > expiry_s + 60
