"""A vocabulary run by the `tokenizers` library: `tokenizer.json`, or a model built in memory. It knows no configs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from lmdeploy.errors import CheckpointError
from lmdeploy.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from lmdeploy.tokenizer.added_tokens import AddedToken


class HuggingFaceVocabulary(Vocabulary):
    """A `tokenizers.Tokenizer` with the text of each token worked out once.

    Joining tokens' bytes gives the same text as the library's own decoder wherever that is valid UTF-8, and can be done
    one token at a time.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, added: Sequence[AddedToken] = ()) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if added:
            from lmdeploy.tokenizer.added_tokens import add_missing

            add_missing(tokenizer, added)
        self._tokenizer = tokenizer
        self._added: dict[int, Any] = tokenizer.get_added_tokens_decoder()
        self._bytes: dict[int, bytes] = {}
        self.size = max(tokenizer.get_vocab_size(with_added_tokens=True), max(self._added, default=-1) + 1)
        declared = {token.text for token in added if token.special}
        self.special_tokens = {
            token.content: token_id
            for token_id, token in self._added.items()
            if token.special or token.content in declared
        }
        self._spelling, self.strips_first_space = _decoding_rule(tokenizer.decoder)
        self.prefix_ids, self.suffix_ids = self._surrounding_ids()

    @classmethod
    def from_file(cls, path: Path, added: Sequence[AddedToken] = ()) -> HuggingFaceVocabulary:
        """Read `tokenizer.json`; raises CheckpointError if the library cannot."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)), added)
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error

    def save(self, folder: Path) -> None:
        self._tokenizer.save(str(folder / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        # Unlike `encode`, this lets other threads run meanwhile, as a server's event loop has to.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def token_to_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._compute_bytes(token_id)
        return known

    def _compute_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return str(self._added[token_id].content).encode("utf-8")
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        if self._spelling == "byte-level":
            return byte_level_to_bytes(token)
        if self._spelling == "words":
            return b" " + token.encode("utf-8")
        if self._spelling == "byte-fallback" and is_byte_piece(token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode("utf-8")

    def id_to_token(self, token_id: int) -> str | None:
        if token_id < 0:
            return None
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def _surrounding_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the file's post-processor puts before and after a text."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start]), tuple(whole[start + len(plain) :])
        return (), ()


def _decoding_rule(decoder: Any) -> tuple[str, bool]:
    """How tokens spell bytes, and whether the first text begins with a space to drop."""
    if decoder is None:
        return "words", True
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return "byte-level", False
    if not kinds & {"ByteFallback", "Replace", "Metaspace"}:
        raise CheckpointError(
            f"tokenizer.json decodes with {sorted(kinds)}, which is not supported; ByteLevel, ByteFallback and Metaspace are"
        )
    strips = any(
        (step["type"] == "Strip" and step.get("start", 0) > 0)
        or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    return ("byte-fallback" if "ByteFallback" in kinds else "pieces"), strips


def is_byte_piece(token: str) -> bool:
    """Whether the token is a byte's stand-in such as `<0x0A>`."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: the visible Latin-1 characters, then U+0100 onwards."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF_CHAR = _byte_alphabet()


def byte_level_to_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for; a token outside the alphabet stands for its own spelling."""
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:
        return token.encode("utf-8")
