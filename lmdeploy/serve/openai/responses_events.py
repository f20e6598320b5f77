"""An answer of /v1/responses as its output items, whole or as events while it comes. It knows no request."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lmdeploy.errors import LMDeployError
from lmdeploy.serve.errors import problem_of
from lmdeploy.serve.openai.pieces import Piece, PieceKind

_PREFIXES: dict[PieceKind, str] = {"text": "msg", "reasoning": "rs", "call": "fc"}
_PARTS: dict[PieceKind, str] = {"text": "output_text", "reasoning": "reasoning_text"}

Event = dict[str, Any]


@dataclass
class Item:
    """One output item, as far as it has come."""

    kind: PieceKind
    index: int = 0
    call_id: str = ""
    name: str = ""
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    id: str = ""

    def __post_init__(self) -> None:
        self.id = f"{_PREFIXES[self.kind]}_{uuid.uuid4().hex}"
        if self.kind == "call":
            self.call_id = self.call_id or f"call_{uuid.uuid4().hex}"

    def takes(self, piece: Piece) -> bool:
        """Whether the piece continues this item."""
        return piece.kind == self.kind and piece.index == self.index

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.logprobs += piece.logprobs

    def part(self) -> dict[str, Any]:
        """The content of an item of text or reasoning."""
        part: dict[str, Any] = {"type": _PARTS[self.kind], "text": self.text}
        return part | {"annotations": [], "logprobs": list(self.logprobs)} if self.kind == "text" else part

    def body(self, status: str, *, is_empty: bool = False) -> dict[str, Any]:
        """The item as a client gets it; is_empty: without its content, as at its beginning."""
        if self.kind == "call":
            arguments = "" if is_empty else self.text
            return {
                "id": self.id, "type": "function_call", "status": status, "call_id": self.call_id, "name": self.name,
                "arguments": arguments,
            }  # fmt: skip
        content = [] if is_empty else [self.part()]
        if self.kind == "reasoning":
            return {"id": self.id, "type": "reasoning", "status": status, "summary": [], "content": content}
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}


def collect_items(pieces: Iterable[Piece]) -> tuple[list[Item], str]:
    """The items of a whole answer, and its finish_reason."""
    items: list[Item] = []
    reason = "stop"
    for piece in pieces:
        if piece.kind == "end":
            reason = piece.text
        else:
            items.append(_open(piece))
            items[-1].add(piece)
    return items, reason


def _open(piece: Piece) -> Item:
    return Item(piece.kind, piece.index, piece.call_id, piece.name)


class Draft:
    """A response on its way: its items so far, and what the client is told of them.

    head: the fields of the response that do not change.
    """

    def __init__(self, head: dict[str, Any]) -> None:
        self.head = head
        self.items: list[Item] = []

    def body(self, reason: str | None, usage: dict[str, Any] | None) -> dict[str, Any]:
        """The response; reason None: still in progress."""
        status, item_status = _status(reason)
        output = [] if reason is None else [item.body(item_status) for item in self.items]
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self.head, "status": status, "incomplete_details": incomplete, "error": None, "output": output,
            "usage": None if usage is None else _usage(usage),
        }  # fmt: skip

    def said(self) -> dict[str, Any]:
        """The answer as a chat message, for the conversation's next turn."""
        text = "".join(item.text for item in self.items if item.kind == "text")
        calls = [
            {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.text}}
            for item in self.items
            if item.kind == "call"
        ]
        return {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}


def _status(reason: str | None) -> tuple[str, str]:
    """Of the response and of its items."""
    if reason is None:
        return "in_progress", "in_progress"
    if reason == "abort":
        return "cancelled", "incomplete"
    return ("incomplete", "incomplete") if reason == "length" else ("completed", "completed")


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """From chat's spelling."""
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
        "total_tokens": usage["total_tokens"],
    }


class EventWriter:
    """Turns pieces into numbered events."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._number = 0

    async def write(self, pieces: AsyncGenerator[Piece, None], usage: Any) -> AsyncGenerator[Event, None]:
        """The events of a stream. usage(): chat's counts so far. An error before the engine has begun is raised."""
        await anext(pieces)
        yield self._event("response.created", response=self._draft.body(None, None))
        yield self._event("response.in_progress", response=self._draft.body(None, None))
        reason = "stop"
        try:
            async for piece in pieces:
                if piece.kind == "end":
                    reason = piece.text
                    continue
                for event in self._add(piece):
                    yield event
        except LMDeployError as error:
            yield self._failed(error)
            return
        if not self._draft.items:
            for event in self._add(Piece("text", "")):
                yield event
        for event in self._close(_status(reason)[1]):
            yield event
        body = self._draft.body(reason, usage())
        # There is no event of a response that was cancelled; its status says so.
        name = "incomplete" if body["status"] == "cancelled" else body["status"]
        yield self._event(f"response.{name}", response=body)

    def _add(self, piece: Piece) -> Iterator[Event]:
        items = self._draft.items
        if not items or not items[-1].takes(piece):
            if items:
                yield from self._close("completed")
            items.append(_open(piece))
            yield self._of_item("response.output_item.added", item=items[-1].body("in_progress", is_empty=True))
            if piece.kind != "call":
                yield self._of_part("response.content_part.added", part=items[-1].part())
        items[-1].add(piece)
        if piece.text:
            yield self._news("delta", delta=piece.text, logprobs=piece.logprobs)

    def _close(self, status: str) -> Iterator[Event]:
        item = self._draft.items[-1]
        if item.kind == "call":
            yield self._news("done", arguments=item.text, name=item.name)
        else:
            yield self._news("done", text=item.text, logprobs=item.logprobs)
            yield self._of_part("response.content_part.done", part=item.part())
        yield self._of_item("response.output_item.done", item=item.body(status))

    def _news(self, what: str, /, *, logprobs: Any = (), **fields: Any) -> Event:
        item = self._draft.items[-1]
        if item.kind == "call":
            return self._of_item(f"response.function_call_arguments.{what}", item_id=item.id, **fields)
        more = {"logprobs": logprobs} if item.kind == "text" else {}
        return self._of_part(f"response.{_PARTS[item.kind]}.{what}", **fields, **more)

    def _of_part(self, name: str, /, **fields: Any) -> Event:
        return self._of_item(name, item_id=self._draft.items[-1].id, content_index=0, **fields)

    def _of_item(self, name: str, /, **fields: Any) -> Event:
        return self._event(name, output_index=len(self._draft.items) - 1, **fields)

    def _failed(self, error: Exception) -> Event:
        problem = problem_of(error)
        code = "rate_limit_exceeded" if problem.status == 429 else "server_error"
        body = self._draft.body(None, None) | {"status": "failed", "error": {"code": code, "message": problem.message}}
        return self._event("response.failed", response=body)

    def _event(self, name: str, /, **fields: Any) -> Event:
        event = {"type": name, "sequence_number": self._number, **fields}
        self._number += 1
        return event
