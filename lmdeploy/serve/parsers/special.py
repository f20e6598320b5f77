"""Takes special tokens, which parsers needed to see, out of the texts that a reader gets. It knows no model's format."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lmdeploy.serve.parsers.events import Content, Event, Parser, Reasoning


class SpecialTokens:
    """The spellings of a vocabulary's special tokens, ready to be looked for."""

    def __init__(self, spellings: Iterable[str]) -> None:
        words = sorted({word for word in spellings if len(word) > 1}, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, words))) if words else None
        self._beginnings = {word[:length] for word in words for length in range(1, len(word))}
        self._max_length = max(map(len, words), default=1)

    def held(self, text: str) -> int:
        """How many characters at the end may still become a special token."""
        for length in range(min(self._max_length - 1, len(text)), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0


class Stripper:
    """Removes special tokens from the texts of events; text that may become one is held back."""

    def __init__(self, tokens: SpecialTokens) -> None:
        self._tokens = tokens
        self._held = ""
        self._kind: type[Content] | type[Reasoning] = Content

    def pass_on(self, events: Iterable[Event]) -> list[Event]:
        out: list[Event] = []
        for event in events:
            if self._tokens.pattern is None or not isinstance(event, (Content, Reasoning)):
                out += [*self.flush(), event]
                continue
            if type(event) is not self._kind:
                out += self.flush()
                self._kind = type(event)
            if text := self._strip(self._held + event.text, self._tokens.pattern):
                out.append(self._kind(text))
        return out

    def _strip(self, text: str, pattern: re.Pattern[str]) -> str:
        """What is sure of a text; never are the two sides of a token that was taken out read as one."""
        kept, end = [], 0
        for match in pattern.finditer(text):
            kept.append(text[end : match.start()])
            end = match.end()
        rest = text[end:]
        held = self._tokens.held(rest)
        self._held = rest[len(rest) - held :]
        return "".join(kept) + rest[: len(rest) - held]

    def flush(self) -> list[Event]:
        """What was held, and turned out to be text."""
        held, self._held = self._held, ""
        return [self._kind(held)] if held else []


class Cleaned(Parser):
    """A parser whose texts come without special tokens."""

    def __init__(self, parser: Parser, tokens: SpecialTokens) -> None:
        self._parser = parser
        self._stripper = Stripper(tokens)

    def feed(self, text: str) -> list[Event]:
        return self._stripper.pass_on(self._parser.feed(text))

    def finish(self) -> list[Event]:
        return self._stripper.pass_on(self._parser.finish()) + self._stripper.flush()
