"""Reading a text that comes in pieces as if it were whole: parsers are generators that stop where text is missing.

It knows JSON and no model's format. Every decision depends on the text alone, never on where a piece ends.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Generator

from lmdeploy.serve.parsers.events import CallArguments, CallStart, Content, Event, Parser, Reasoning

Steps = Generator[None, None, None]
Emit = Callable[[str], None]

_SPACE = " \t\r\n"
_STRUCTURE = re.compile(r'["\[\]{}]')
_STRING_END = re.compile(r'["\\]')
_SCALAR_END = re.compile(r"[,\]}\s<]")


class Scanner(Parser):
    """A parser written as one generator, `_run`, which takes from `_buffer` and yields when it needs more text."""

    def __init__(self) -> None:
        self._buffer = ""
        self._has_ended = False
        self._has_called = False
        self._events: list[Event] = []
        self._record: list[str] | None = None
        self._steps = self._run()
        next(self._steps, None)

    def feed(self, text: str) -> list[Event]:
        self._buffer += text
        return self._advance()

    def finish(self) -> list[Event]:
        self._has_ended = True
        return self._advance()

    @abstractmethod
    def _run(self) -> Steps:
        """Parse a whole text. Ends only after the text has."""

    def _advance(self) -> list[Event]:
        next(self._steps, None)
        events, self._events = self._events, []
        return events

    def _content(self, text: str) -> None:
        if text:
            self._events.append(Content(text))

    def _reasoning(self, text: str) -> None:
        if text:
            self._events.append(Reasoning(text))

    def _start_call(self, name: str) -> None:
        self._has_called = True
        self._events.append(CallStart(name))

    def _arguments(self, text: str) -> None:
        if text:
            self._events.append(CallArguments(text))

    def _take(self, count: int) -> str:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        if self._record is not None:
            self._record.append(taken)
        return taken

    def _begin_record(self, text: str) -> None:
        """Remember what is taken from here on, and before it `text`, for the case that it turns out to be plain text."""
        self._record = [text]

    def _end_record(self) -> str:
        record, self._record = self._record or [], None
        return "".join(record)

    def _until(
        self, markers: tuple[str, ...], emit: Emit, *, drops_space: bool = False
    ) -> Generator[None, None, str | None]:
        """Emit the text before the first marker, and take the marker; None where the text ends without one.

        drops_space: white space directly before the marker is not emitted, and after a call none at the text's end.
        """
        while True:
            found = [(start, marker) for marker in markers if (start := self._buffer.find(marker)) >= 0]
            if found:
                start, marker = min(found, key=lambda item: (item[0], -len(item[1])))
                text = self._take(start)
                emit(text.rstrip(_SPACE) if drops_space else text)
                return self._take(len(marker))
            if self._has_ended:
                text = self._take(len(self._buffer))
                emit(text.rstrip(_SPACE) if drops_space and self._has_called else text)
                return None
            safe = len(self._buffer) - max(overlap(self._buffer, marker) for marker in markers)
            if drops_space:
                safe = len(self._buffer[:safe].rstrip(_SPACE))
            if safe:
                emit(self._take(safe))
            yield

    def _space(self) -> Generator[None, None, str]:
        """Take white space."""
        taken = ""
        while True:
            rest = self._buffer.lstrip(_SPACE)
            taken += self._take(len(self._buffer) - len(rest))
            if rest or self._has_ended:
                return taken
            yield

    def _accept(self, *literals: str) -> Generator[None, None, str]:
        """Take the first literal that the text goes on with; empty if it is none of them."""
        for literal in literals:
            while not self._has_ended and len(self._buffer) < len(literal) and literal.startswith(self._buffer):
                yield
            if self._buffer.startswith(literal):
                return self._take(len(literal))
        return ""

    def _json_value(self, emit: Emit) -> Generator[None, None, bool]:
        """Emit one JSON value as it comes; False if there is none, or the text ends inside it."""
        while not self._buffer and not self._has_ended:
            yield
        first = self._buffer[:1]
        if first == '"':
            return (yield from self._json_string(emit))
        if first and first in "{[":
            return (yield from self._json_nested(emit))
        if not first or first not in "-0123456789tfn":
            return False
        while (match := _SCALAR_END.search(self._buffer)) is None and not self._has_ended:
            emit(self._take(len(self._buffer)))
            yield
        emit(self._take(len(self._buffer) if match is None else match.start()))
        return True

    def _json_nested(self, emit: Emit) -> Generator[None, None, bool]:
        depth = 0
        while True:
            match = _STRUCTURE.search(self._buffer)
            if match is None:
                emit(self._take(len(self._buffer)))
                if self._has_ended:
                    return False
                yield
                continue
            emit(self._take(match.start()))
            if match.group() == '"':
                if not (yield from self._json_string(emit)):
                    return False
                continue
            emit(self._take(1))
            depth += 1 if match.group() in "{[" else -1
            if depth == 0:
                return True

    def _json_string(self, emit: Emit) -> Generator[None, None, bool]:
        emit(self._take(1))
        while True:
            match = _STRING_END.search(self._buffer)
            if match is None or (match.group() == "\\" and match.end() == len(self._buffer)):
                emit(self._take(len(self._buffer) if match is None else match.start()))
                if self._has_ended:
                    emit(self._take(len(self._buffer)))
                    return False
                yield
                continue
            is_end = match.group() == '"'
            emit(self._take(match.end() + (not is_end)))
            if is_end:
                return True

    def _read_json(self) -> Generator[None, None, object]:
        """One JSON value whole; None where it is broken."""
        pieces: list[str] = []
        yield from self._json_value(pieces.append)
        try:
            value: object = json.loads("".join(pieces))
        except (ValueError, RecursionError):
            return None
        return value

    def _read_until(self, *markers: str) -> Generator[None, None, tuple[str, str | None]]:
        """The text before a marker, and the marker."""
        pieces: list[str] = []
        marker = yield from self._until(markers, pieces.append)
        return "".join(pieces), marker


def overlap(text: str, word: str) -> int:
    """Length of the longest proper prefix of word that text ends with."""
    for length in range(min(len(word) - 1, len(text)), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0


def ignore(text: str) -> None:
    """An Emit for text that nobody is to see."""
