"""A chat's answer as pieces of text, reasoning and tool calls, for the interfaces that are built on top of chat.

It knows what chat answers, whole and streamed, and nothing of what those interfaces make of it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from lmdeploy.errors import InvalidParameter
from lmdeploy.serve.openai.protocol import ChatRequest

_MAX_FINDINGS = 5

PieceKind = Literal["reasoning", "text", "call", "end"]


@dataclass(frozen=True)
class Piece:
    """What is new in an answer. text: of a call its arguments, of the end the finish_reason.

    index, call_id and name tell calls apart; name and call_id come with a call's first piece only.
    """

    kind: PieceKind
    text: str
    index: int = 0
    call_id: str = ""
    name: str = ""
    logprobs: tuple[dict[str, Any], ...] = ()


def chat_request(fields: dict[str, Any]) -> ChatRequest:
    """A chat's body out of another interface's fields, within the same bounds. Raises InvalidParameter."""
    try:
        return ChatRequest.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        found = [
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()[:_MAX_FINDINGS]
        ]
        raise InvalidParameter("; ".join(found)) from None


def message_pieces(choice: dict[str, Any]) -> Iterator[Piece]:
    """The pieces of a whole answer's choice; one of text even where that is empty, unless there are calls."""
    message = choice["message"]
    calls = message.get("tool_calls") or []
    if reasoning := message.get("reasoning_content"):
        yield Piece("reasoning", reasoning)
    if message.get("content") or not calls:
        yield Piece("text", message.get("content") or "", logprobs=_logprobs(choice))
    for index, call in enumerate(calls):
        yield _call(index, call)
    yield Piece("end", choice["finish_reason"] or "stop")


async def chunk_pieces(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[Piece, None]:
    """The pieces of a streamed answer with one choice. The first, with no text, comes once the engine has begun."""
    has_begun = False
    async for chunk in chunks:
        if not has_begun:
            has_begun = True
            yield Piece("text", "")
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if reasoning := delta.get("reasoning_content"):
                yield Piece("reasoning", reasoning)
            if text := delta.get("content"):
                yield Piece("text", text, logprobs=_logprobs(choice))
            for number, call in enumerate(delta.get("tool_calls") or []):
                yield _call(call.get("index", number), call)
            if (reason := choice.get("finish_reason")) is not None:
                yield Piece("end", reason)


def _call(index: int, call: dict[str, Any]) -> Piece:
    function = call.get("function") or {}
    return Piece("call", function.get("arguments") or "", index, call.get("id") or "", function.get("name") or "")


def _logprobs(choice: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    return tuple((choice.get("logprobs") or {}).get("content") or ())
