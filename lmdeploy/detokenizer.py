"""Text from a stream of token ids, and stop strings in a stream of text. It knows neither engine nor vocabulary files."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lmdeploy.errors import InvalidParameter

if TYPE_CHECKING:
    from lmdeploy.tokenizer.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Text of ids that come one step at a time; all of it joined is `tokenizer.decode` of all the ids.

    A character whose bytes are spread over tokens appears once it is complete. Constant work for each token: bytes are
    only ever appended. spaces_between_special_tokens is LMDeploy's name and changes nothing: as with the Rust tokenizers
    of today's models, kept special tokens stand in the text exactly as spelled, which parsers of tool calls rely on.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = tokenizer.strips_first_space

    def add(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; empty while a character is still open."""
        tokenizer, skips = self._tokenizer, self._skip_special_tokens
        data = b"".join(tokenizer.token_to_bytes(i) for i in ids if not (skips and tokenizer.is_special(i)))
        return self._emit(self._decoder.decode(data))

    def flush(self) -> str:
        """What is left: bytes of an unfinished character, as U+FFFD."""
        return self._emit(self._decoder.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if self._drops_space and text:
            self._drops_space = False
            return text[1:] if text.startswith(" ") else text
        return text


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
