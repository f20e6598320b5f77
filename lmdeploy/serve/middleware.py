"""What every request passes before its endpoint, as plain ASGI: keys, size and depth of the body. It knows no endpoint."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterable, Sequence

from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmdeploy.serve import chat_page
from lmdeploy.serve.errors import Problem, refusal

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", *chat_page.PATHS})


class Authentication:
    """Lets a request through that bears one of the keys; without keys every one. Denies what it does not understand.

    The path is the one that is routed (`scope["path"]`), which no header can change. `scope["state"]["tenant"]` becomes a
    digest of the key, by which caches are kept apart; `scope["state"]["is_admin"]` tells the administrator's key, which
    opens every path.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], admin_api_key: str | None = None) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in api_keys]
        self._admin_digest = None if admin_api_key is None else _digest(admin_api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not (self._digests or self._admin_digest):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        given = _given_key(scope["headers"])
        digest = _digest(given or b"")
        # Every key is compared, in constant time.
        same = [hmac.compare_digest(known, digest) for known in self._digests]
        is_user = given is not None and True in same
        is_admin = given is not None and hmac.compare_digest(self._admin_digest or b"", digest)
        if self._digests and not (is_user or is_admin) and scope["path"] not in OPEN_PATHS:
            message = "give one of the server's API keys in the header `Authorization: Bearer KEY`"
            problem = Problem(401, message, "authentication_error", "invalid_api_key")
            await problem.response(scope["path"])(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["tenant"] = digest.hex() if is_user or is_admin else ""
        state["is_admin"] = is_admin
        await self._app(scope, receive, send)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _given_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The one key that a request bears, as a bearer or, as Anthropic's clients do, in `x-api-key`; None of two."""
    found = set()
    for name, value in headers:
        if name == b"x-api-key":
            found.add(value.strip())
        elif name == b"authorization":
            scheme, _, key = value.partition(b" ")
            found.add(key.strip() if scheme.lower() == b"bearer" else b"")
    return found.pop() if len(found) == 1 else None


class BodyLimits:
    """Reads the whole body, at most `max_bytes` in `timeout_s`; refuses what is no JSON or nested without end."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            body: bytes | Problem | None = self._announced(scope)
            if body is None:
                body = await asyncio.wait_for(self._read(receive), self._timeout_s)
        except asyncio.TimeoutError:
            body = refusal(408, f"the body did not arrive within {self._timeout_s:g} seconds")
        if isinstance(body, bytes) and body:
            body = _check_json(scope, body) or body
        if body is None:
            return
        if isinstance(body, Problem):
            await body.response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    def _announced(self, scope: Scope) -> Problem | None:
        """A body that its header already tells to be too large need not be waited for."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        return self._too_large() if length.isdigit() and int(length[:20]) > self._max_bytes else None

    def _too_large(self) -> Problem:
        return refusal(413, f"the body has more than {self._max_bytes:,} bytes")

    async def _read(self, receive: Receive) -> bytes | Problem | None:
        """The body, or why it is refused; None where the client went away."""
        chunks = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks += message.get("body", b"")
            if len(chunks) > self._max_bytes:
                return self._too_large()
            if not message.get("more_body", False):
                return bytes(chunks)


def _check_json(scope: Scope, body: bytes) -> Problem | None:
    """pydantic's reader refuses nesting beyond 200, NaN, and halves of surrogate pairs; the standard library's does not."""
    kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json" and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
        return refusal(400, "unsupported media type: send JSON with the header `Content-Type: application/json`")
    try:
        from_json(body, allow_inf_nan=False, cache_strings=False)
    except ValueError as error:
        return refusal(400, f"the body cannot be read as JSON: {error}")
    return None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body first, and then what the connection gives."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
