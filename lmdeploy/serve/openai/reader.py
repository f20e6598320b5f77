"""From what a parser finds in an answer to OpenAI's messages and deltas. It knows no format and no engine."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from typing import Any

from lmdeploy.serve.parsers.events import CallArguments, CallStart, Content, Event, Parser, Reasoning

_ID_LETTERS = string.ascii_letters + string.digits
_ID_LENGTH = 24


class ChoiceReader:
    """Reads one choice's text. Its deltas, joined, are its message."""

    def __init__(
        self,
        parser: Parser | None,
        *,
        keeps_one_call: bool = False,
        id_length: int | None = None,
        is_function_call: bool = False,
    ) -> None:
        """parser: None for text as it is. keeps_one_call: later ones are dropped. is_function_call: OpenAI's older form."""
        self._parser = parser
        self._keeps_one_call = keeps_one_call or is_function_call
        self._id_length = id_length
        self._is_function_call = is_function_call
        self._num_started = 0
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []

    def read(self, text: str, is_end: bool) -> list[dict[str, Any]]:
        """The deltas that more text gives, and with is_end all that are left."""
        if self._parser is None:
            events: list[Event] = [Content(text)] if text else []
        else:
            events = self._parser.feed(text) if text else []
            events += self._parser.finish() if is_end else []
        return [delta for event in _joined(events) if (delta := self._delta(event)) is not None]

    def message(self) -> dict[str, Any]:
        """What has been read so far."""
        calls = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": "".join(arguments)}}
            for call_id, name, arguments in self._calls
        ]
        content = "".join(self._content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not content else content,
            "reasoning_content": self.reasoning or None,
            "tool_calls": None if self._is_function_call else calls or None,
        }
        if self._is_function_call and calls:
            message["function_call"] = calls[0]["function"]
        return message

    @property
    def reasoning(self) -> str:
        """The thoughts so far."""
        return "".join(self._reasoning)

    def finish_reason(self, reason: str | None) -> str | None:
        """The reason as OpenAI names it, where the answer called a tool."""
        if reason != "stop" or not self._calls:
            return reason
        return "function_call" if self._is_function_call else "tool_calls"

    def _delta(self, event: Event) -> dict[str, Any] | None:
        if isinstance(event, Content):
            self._content.append(event.text)
            return {"content": event.text}
        if isinstance(event, Reasoning):
            self._reasoning.append(event.text)
            return {"reasoning_content": event.text}
        if isinstance(event, CallStart):
            self._num_started += 1
            if self._keeps_one_call and self._num_started > 1:
                return None
            self._calls.append((self._new_id(), event.name, []))
            return self._call_delta({"name": event.name, "arguments": ""}, is_first=True)
        if self._keeps_one_call and self._num_started > 1:
            return None
        self._calls[-1][2].append(event.text)
        return self._call_delta({"arguments": event.text})

    def _call_delta(self, function: dict[str, str], is_first: bool = False) -> dict[str, Any]:
        if self._is_function_call:
            return {"function_call": function}
        head = {"id": self._calls[-1][0], "type": "function"} if is_first else {}
        return {"tool_calls": [{"index": len(self._calls) - 1, **head, "function": function}]}

    def _new_id(self) -> str:
        prefix, length = ("call_", _ID_LENGTH) if self._id_length is None else ("", self._id_length)
        return prefix + "".join(secrets.choice(_ID_LETTERS) for _ in range(length))


def _joined(events: Sequence[Event]) -> list[Event]:
    """Neighbours of one kind as one."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, (Content, Reasoning, CallArguments)) and type(last) is type(event):
            out[-1] = type(event)(last.text + event.text)
        else:
            out.append(event)
    return out
