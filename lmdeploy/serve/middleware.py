"""What every request passes before its endpoint, as plain ASGI: keys, size and depth of the body. It knows no endpoint."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence

from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmdeploy.serve.errors import Problem, refusal

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})


class Authentication:
    """Lets a request through that bears one of the keys; without keys every one. Denies what it does not understand.

    The path is the one that is routed (`scope["path"]`), which no header can change. `scope["state"]["tenant"]` becomes a
    digest of the key, by which caches are kept apart.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._digests:
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        digest = self._find(scope)
        if digest is None and scope["path"] not in OPEN_PATHS:
            message = "give one of the server's API keys in the header `Authorization: Bearer KEY`"
            await Problem(401, message, "authentication_error", "invalid_api_key").response()(scope, receive, send)
            return
        scope.setdefault("state", {})["tenant"] = "" if digest is None else digest.hex()
        await self._app(scope, receive, send)

    def _find(self, scope: Scope) -> bytes | None:
        """The digest of the key that the request bears; every key is compared, in constant time."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (values[0] if len(values) == 1 else b"").partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        same = [digest for digest in self._digests if hmac.compare_digest(digest, given)]
        return same[0] if same and scheme.lower() == b"bearer" else None


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
            body = await asyncio.wait_for(self._read(receive), self._timeout_s)
        except asyncio.TimeoutError:
            body = refusal(408, f"the body did not arrive within {self._timeout_s:g} seconds")
        if isinstance(body, bytes) and body:
            body = _check_json(scope, body) or body
        if body is None:
            return
        if isinstance(body, Problem):
            await body.response()(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | Problem | None:
        """The body, or why it is refused; None where the client went away."""
        chunks = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks += message.get("body", b"")
            if len(chunks) > self._max_bytes:
                return refusal(413, f"the body has more than {self._max_bytes:,} bytes")
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
