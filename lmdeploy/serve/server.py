"""Listening, signals and the end: uvicorn around an application, drained before it stops. It knows no endpoint."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from lmdeploy.errors import ConfigError
from lmdeploy.serve.http_protocol import PatientProtocol

_MAX_HEADER_BYTES = 64 << 10
_BACKLOG = 2048
# Longer than clients and balancers keep an idle connection (httpx 5 s, many balancers 60): whoever closes first must not
# be the one that a request may already be on its way to.
_KEEP_ALIVE_S = 75
_LAST_WORDS_S = 2  # after the drain, for connections to take what is still on its way to them


@dataclass(frozen=True)
class Tls:
    key_file: str
    cert_file: str


class Drainable(Protocol):
    """num_active: answers in work. is_draining: set once no new ones are to be taken."""

    num_active: int
    is_draining: bool


def bind(host: str, port: int) -> socket.socket:
    """A socket bound but not yet listening, so that a port in use is known before a model is loaded. port 0: a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # there it would let two servers share the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another --server-port") from error
    sock.set_inheritable(False)
    return sock


def _without_last_words(app: ASGIApp) -> ASGIApp:
    """The application; that a task of it was cancelled at the end is no error to be logged with a traceback."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(asyncio.CancelledError):
            await app(scope, receive, send)

    return run


class Server(uvicorn.Server):
    """The first signal drains: readiness says 503, nothing new is taken, what runs ends. The second stops at once."""

    def __init__(
        self, app: FastAPI, *, drain_timeout_s: float = 60.0, log_level: str = "warning", tls: Tls | None = None
    ):
        config = uvicorn.Config(
            _without_last_words(app),
            http=PatientProtocol,  # over h11, which bounds headers
            ws="none",
            lifespan="off",
            log_level=log_level,
            access_log=log_level in ("info", "debug"),
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            timeout_graceful_shutdown=_LAST_WORDS_S,
            ssl_keyfile=tls.key_file if tls else None,
            ssl_certfile=tls.cert_file if tls else None,
        )
        super().__init__(config)
        self._service: Drainable = app.state.service
        self._drain_timeout_s = drain_timeout_s
        self._is_cut_off = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.is_draining:
            self._is_cut_off = bool(self._service.num_active)
            self.force_exit = self.should_exit = True
        self._service.is_draining = True

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        watcher = asyncio.ensure_future(self._stop_when_drained())
        try:
            await super().serve(sockets)
        finally:
            watcher.cancel()

    async def _stop_when_drained(self) -> None:
        while not self._service.is_draining:
            await asyncio.sleep(0.05)
        deadline = time.monotonic() + self._drain_timeout_s
        while self._service.num_active and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._is_cut_off = self._is_cut_off or bool(self._service.num_active)
        self.should_exit = True

    def run_on(self, sock: socket.socket) -> int:
        """Serve until a signal; 0 after a drain, 1 if a second signal or the drain's time limit cut answers off."""
        self.run(sockets=[sock])
        return int(self._is_cut_off)
