"""One client's request as the proxy reads it: whose model, which session, which beginning. It is sent on unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from lmdeploy.errors import InvalidParameter

# RFC 9110, section 7.6.1: of one connection only. The rest is made anew for the next one.
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding upgrade"
    .split()
)  # fmt: skip
RESPONSES = "/v1/responses"
_MADE_ANEW = frozenset({b"host", b"content-length", b"expect"})

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Ask:
    """model: None where the body names none. tenant: whose caches are kept apart. headers: those to be sent on."""

    path: str
    body: bytes
    fields: Mapping[str, Any]
    headers: Headers
    model: str | None
    tenant: str = ""
    method: str = "POST"

    @property
    def session(self) -> str | None:
        """What only one node remembers: a stateful session of /v1/chat/interactive."""
        session_id = self.fields.get("session_id")
        is_stateful = self.path == "/v1/chat/interactive" and type(session_id) is int and session_id >= 0
        return f"{self.tenant}\0{session_id}" if is_stateful else None

    @property
    def response_id(self) -> str | None:
        """The answer of /v1/responses that the request is about; the node that gave it has kept it."""
        response_id = self.fields.get("previous_response_id") if self.path.startswith(RESPONSES) else None
        return response_id if isinstance(response_id, str) else None


def read_ask(path: str, body: bytes, headers: Sequence[tuple[bytes, bytes]], tenant: str) -> Ask:
    """Raises InvalidParameter for a body that is no JSON object, or a model that is no text."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidParameter("the body cannot be read as JSON") from error
    if not isinstance(fields, dict):
        raise InvalidParameter("the body has to be a JSON object")
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise InvalidParameter("model: give a text")
    return Ask(path, body, fields, to_send(headers), model, tenant)


def to_send(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """A client's headers as a node gets them."""
    return [item for item in end_to_end(headers) if item[0] not in _MADE_ANEW]


def end_to_end(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """The headers that are not about one connection only, in lower case."""
    lower = [(name.lower(), value) for name, value in headers]
    named = {word.strip().lower() for name, value in lower if name == b"connection" for word in value.split(b",")}
    return [(name, value) for name, value in lower if name not in _HOP_BY_HOP and name not in named]
