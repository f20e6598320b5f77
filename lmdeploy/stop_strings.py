"""Stop strings in a stream of text. It knows no token."""

from __future__ import annotations

from collections.abc import Sequence

from lmdeploy.errors import InvalidParameter


class StopChecker:
    """Finds the first stop string to be completed, however the text is cut into pieces.

    Of several completed by the same character the longest counts. The stop string itself is emitted only with
    include_in_output, nothing after it ever.
    """

    def __init__(self, stop_words: Sequence[str], include_in_output: bool = False) -> None:
        if not all(isinstance(word, str) and word for word in stop_words):
            raise InvalidParameter(f"stop_words={list(stop_words)!r}: give strings of at least one character")
        self._words = tuple(dict.fromkeys(stop_words))
        self._include = include_in_output
        self._held = ""
        self._stopped = False

    def feed(self, text: str) -> tuple[str, bool]:
        """Take new text; returns what can be emitted now and whether a stop string has come.

        The longest end of the text that could still become a stop string is held back.
        """
        if self._stopped:
            return "", True
        if not self._words:
            return text, False
        text = self._held + text
        found = [(start + len(word), start) for word in self._words if (start := text.find(word)) >= 0]
        if found:
            end, start = min(found)
            self._held, self._stopped = "", True
            return text[: end if self._include else start], True
        keep = max(_overlap(text, word) for word in self._words)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The held text, which turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, word: str) -> int:
    """Length of the longest proper prefix of word that text ends with."""
    for length in range(min(len(word) - 1, len(text)), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
