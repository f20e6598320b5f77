"""A chat's answer as a message of content blocks, whole or as events while it comes. It knows no request's fields."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec

from lmdeploy.errors import LMDeployError
from lmdeploy.serve.errors import problem_of
from lmdeploy.serve.openai.pieces import Piece
from lmdeploy.stop_strings import StopChecker

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}

Event = dict[str, Any]
Counts = Callable[[], dict[str, Any]]


class StopFinder:
    """Takes the stop sequence off the end of the text, and knows which one it was.

    silent: strings that end an answer without being a stop sequence of the request's.
    """

    def __init__(self, stop_sequences: Sequence[str], silent: Sequence[str] = ()) -> None:
        self._sequences = list(stop_sequences)
        self._checker = StopChecker([*stop_sequences, *silent])
        self._tail = ""
        self._longest = max((len(word) for word in stop_sequences), default=0)
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The text that is certainly none of a stop sequence."""
        safe, is_found = self._checker.feed(text)
        self._tail = (self._tail + text)[-self._longest - len(text) :]
        if is_found and self.found is None:
            ends = [word for word in self._sequences if word in self._tail]
            self.found = max(ends, key=len, default=None)
        return safe

    def flush(self) -> str:
        """What was held back and has turned out to be none."""
        return self._checker.flush()


class MessageWriter:
    """One message on its way. usage(): chat's counts so far."""

    def __init__(self, model: str, stops: StopFinder, usage: Counts) -> None:
        self._model = model
        self._stops = stops
        self._usage = usage
        self._id = f"msg_{uuid.uuid4().hex}"
        self._num_blocks = 0
        self._open: tuple[str, int] | None = None
        self._has_calls = False

    def whole(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        reason = "stop"
        for piece in pieces:
            if piece.kind == "end":
                reason = piece.text
            elif piece.kind == "text":
                content.append({"type": "text", "text": self._stops.feed(piece.text) + self._stops.flush()})
            elif piece.kind == "reasoning":
                content.append({"type": "thinking", "thinking": piece.text, "signature": ""})
            else:
                self._has_calls = True
                content.append({**_call_block(piece), "input": _arguments(piece.text)})
        has_more = any(block["type"] == "tool_use" for block in content)
        content = [block for block in content if not (has_more and block["type"] == "text" and not block["text"])]
        return {**self._message(content), **self._end(reason)}

    async def events(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Event, None]:
        """The events of a stream. An error before the engine has begun is raised."""
        await anext(pieces)
        yield {"type": "message_start", "message": self._message([])}
        reason = "stop"
        try:
            async for piece in pieces:
                if piece.kind == "end":
                    reason = piece.text
                else:
                    for event in self._add(piece):
                        yield event
        except LMDeployError as error:
            yield problem_of(error).typed_body()
            return
        if rest := self._stops.flush():
            for event in self._write(Piece("text", rest)):
                yield event
        if self._open is None:
            for event in self._start(Piece("text", "")):
                yield event
        yield self._stop()
        yield {"type": "message_delta", "delta": self._end(reason), "usage": self._counts()}
        yield {"type": "message_stop"}

    def _add(self, piece: Piece) -> Iterator[Event]:
        if piece.kind == "text":
            if safe := self._stops.feed(piece.text):
                yield from self._write(Piece("text", safe))
        else:
            yield from self._write(piece)

    def _write(self, piece: Piece) -> Iterator[Event]:
        if self._open != (piece.kind, piece.index):
            if self._open is not None:
                yield self._stop()
            yield from self._start(piece)
        if piece.text:
            yield {"type": "content_block_delta", "index": self._num_blocks - 1, "delta": _delta(piece)}

    def _start(self, piece: Piece) -> Iterator[Event]:
        self._open = piece.kind, piece.index
        if piece.kind == "call":
            self._has_calls = True
            block = _call_block(piece)
        elif piece.kind == "reasoning":
            block = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            block = {"type": "text", "text": ""}
        yield {"type": "content_block_start", "index": self._num_blocks, "content_block": block}
        self._num_blocks += 1

    def _stop(self) -> Event:
        return {"type": "content_block_stop", "index": self._num_blocks - 1}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": content,
            "stop_reason": None, "stop_sequence": None, "usage": self._counts(),
        }  # fmt: skip

    def _end(self, reason: str) -> dict[str, Any]:
        if self._stops.found is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": self._stops.found}
        name = "tool_use" if self._has_calls and reason != "length" else _STOP_REASONS.get(reason, "end_turn")
        return {"stop_reason": name, "stop_sequence": None}

    def _counts(self) -> dict[str, Any]:
        """Tokens read from the cache are not among the input tokens there."""
        usage = self._usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "output_tokens": usage["completion_tokens"],
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
        }


def _call_block(piece: Piece) -> dict[str, Any]:
    return {"type": "tool_use", "id": piece.call_id or f"toolu_{uuid.uuid4().hex}", "name": piece.name, "input": {}}


def _arguments(text: str) -> Any:
    """The arguments as an object; what the model wrote that is none stands under `_raw`, as nothing may be lost."""
    try:
        value = msgspec.json.decode(text or "{}")
    except (msgspec.DecodeError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"_raw": text}


def _delta(piece: Piece) -> dict[str, Any]:
    if piece.kind == "call":
        return {"type": "input_json_delta", "partial_json": piece.text}
    if piece.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": piece.text}
    return {"type": "text_delta", "text": piece.text}
