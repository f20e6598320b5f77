"""What ties a request to its lines in the log: its id, and one line when it has ended. It knows no endpoint."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmdeploy.logging import get_logger

_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_MAX_PATH_CHARS = 200
_logger = logging.getLogger("lmdeploy.requests")  # with a level of its own: at INFO the package's shows prompts, too
_current_id: ContextVar[str] = ContextVar("lmdeploy_request_id", default="")


class RequestIds:
    """Gives each request the id of its header `X-Request-Id`, if that is a decent one, else a new one; answers bear it.

    has_log: also log method, path, status and seconds of each request.
    """

    def __init__(self, app: ASGIApp, has_log: bool = False) -> None:
        self._app = app
        self._has_log = has_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _given_id(scope) or uuid.uuid4().hex
        _current_id.set(request_id)
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 499  # unless an answer begins, the client has gone

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # The second name is the one that Anthropic's clients read.
                ids = [(name, request_id.encode()) for name in (b"x-request-id", b"request-id")]
                message = {**message, "headers": [*message.get("headers", ()), *ids]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if self._has_log:
                _log(scope, status, time.monotonic() - started)


def _given_id(scope: Scope) -> str | None:
    values = [value for name, value in scope["headers"] if name == b"x-request-id"]
    return values[0].decode() if len(values) == 1 and _ID.fullmatch(values[0]) else None


def _log(scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
    client = scope.get("client") or ("", 0)
    fields = {
        "client": f"{client[0]}:{client[1]}",
        "method": scope["method"],
        "path": scope["path"][:_MAX_PATH_CHARS],
        "status": status,
        "seconds": round(seconds, 6),
    }
    text = "{client} {method} {path!r} {status} {seconds:.3f} s".format(**fields)
    _logger.info(text, extra={"fields": fields})


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, the request's id, and the fields that the event brings."""

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := _current_id.get():
            event["request_id"] = request_id
        event |= getattr(record, "fields", {})
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, ensure_ascii=False, default=str)


def log_as_json() -> None:
    """Turn what this process logs into lines of JSON, uvicorn's own events included; its lines a request are ours here."""
    own = get_logger()
    for handler in own.handlers:
        handler.setFormatter(JsonFormatter())
    _logger.setLevel(logging.INFO)
    server = logging.getLogger("uvicorn")
    server.handlers, server.propagate = list(own.handlers), False
    for name, propagates in (("uvicorn.error", True), ("uvicorn.access", False)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], propagates
