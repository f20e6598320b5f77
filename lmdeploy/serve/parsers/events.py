"""What an answer's text consists of, and what every parser of it does. It knows no model's format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text that the model thinks."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call of a tool begins; the CallArguments up to the next CallStart are its own."""

    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the call's arguments, as JSON."""

    text: str


Event = Content | Reasoning | CallStart | CallArguments


class Parser(ABC):
    """Takes an answer's text as it comes.

    However a text is cut into pieces, the events of all pieces, texts of neighbours of one kind joined, are the same.
    """

    @abstractmethod
    def feed(self, text: str) -> list[Event]:
        """What more text tells."""

    @abstractmethod
    def finish(self) -> list[Event]:
        """What the end of the text tells; nothing is fed after it."""


class Chain(Parser):
    """Parsers one after the other: what one calls content, the next one reads."""

    def __init__(self, parsers: Sequence[Parser]) -> None:
        self._parsers = parsers

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = [Content(text)]
        for parser in self._parsers:
            events = _pass_on(events, parser)
        return events

    def finish(self) -> list[Event]:
        events: list[Event] = []
        for parser in self._parsers:
            events = _pass_on(events, parser) + parser.finish()
        return events


def _pass_on(events: Sequence[Event], parser: Parser) -> list[Event]:
    out: list[Event] = []
    for event in events:
        out += parser.feed(event.text) if isinstance(event, Content) else [event]
    return out
