"""Text from a stream of token ids. It knows neither engine nor vocabulary files."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING

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
