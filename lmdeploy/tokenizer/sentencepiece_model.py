"""A SentencePiece vocabulary (`tokenizer.model`) with the tokens that a checkpoint adds to it. It knows no configs.

Source: SentencePiece, https://arxiv.org/abs/1808.06226
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from lmdeploy.errors import CheckpointError
from lmdeploy.tokenizer.added_tokens import AddedToken
from lmdeploy.tokenizer.vocabulary import Vocabulary

_ADD_DUMMY_PREFIX = b"\x18"  # tag of the normalizer's field 3, a bool


class SentencePieceVocabulary(Vocabulary):
    """SentencePiece on the text between special tokens.

    Control pieces and added tokens are cut out of the text first, the longest spelling before its prefixes; an added
    token takes over the piece whose id it has. space_before: "every" puts the model's leading space before each stretch
    of text, as the original code of these models does, "first" only at the very beginning of the text. piece_count: size of
    the model without added tokens.
    """

    def __init__(self, model: bytes, added: Sequence[AddedToken] = (), space_before: str = "every") -> None:
        self._model = _load_model(model)
        self.strips_first_space = self._model.normalize("a").startswith("▁")
        self._space_at_start_only = self.strips_first_space and space_before == "first"
        if self._space_at_start_only:
            # Protobuf merges a message that comes twice, so this switches one field of the normalizer off.
            self._model = _load_model(model + _field(3, _ADD_DUMMY_PREFIX + b"\x00"))
        pieces = self._model.get_piece_size()
        tokens = {token.id: token for token in self._control_tokens(pieces)} | {token.id: token for token in added}
        self._added = {token_id: token.text.encode("utf-8") for token_id, token in tokens.items()}
        self._added_ids = {token.text: token_id for token_id, token in tokens.items()}
        self.special_tokens = {token.text: token.id for token in tokens.values() if token.special}
        self.size = max(pieces, max(tokens, default=-1) + 1)
        self.piece_count = pieces
        self._bytes: dict[int, bytes] = {}
        self._cut = _cutting_pattern([token for token in tokens.values() if token.is_found_in_text])
        self.named_tokens = self._name_tokens()
        begin = self._model.bos_id()
        self.prefix_ids = (begin,) if begin >= 0 else ()

    def _name_tokens(self) -> dict[str, str]:
        """The model file's own begin, end and unknown tokens."""
        ids = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id(), "unk_token": self._model.unk_id()}
        return {name: self._model.id_to_piece(token_id) for name, token_id in ids.items() if token_id >= 0}

    def _control_tokens(self, count: int) -> Iterator[AddedToken]:
        pieces = self._model.id_to_piece(list(range(count)))
        for token_id, is_control in enumerate(self._model.is_control(list(range(count)))):
            if is_control or token_id == self._model.unk_id():
                yield AddedToken(token_id, pieces[token_id])

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self._model.serialized_model_proto())

    def encode(self, text: str) -> list[int]:
        if self._cut is None:
            return self._encode_stretch(text, at_start=True)
        ids: list[int] = []
        position = 0
        for match in self._cut.finditer(text):
            ids += self._encode_stretch(text[position : match.start()], at_start=position == 0)
            spelled = match.group()
            ids.append(self._added_ids[spelled if spelled in self._added_ids else spelled.strip()])
            position = match.end()
        return ids + self._encode_stretch(text[position:], at_start=position == 0)

    def _encode_stretch(self, text: str, at_start: bool) -> list[int]:
        if not text:
            return []
        if at_start and self._space_at_start_only:
            text = " " + text
        ids: list[int] = self._model.encode(text)
        return ids

    def token_to_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._compute_bytes(token_id)
        return known

    def _compute_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        if not 0 <= token_id < self.piece_count:
            return b""
        piece: str = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode("utf-8")

    def id_to_token(self, token_id: int) -> str | None:
        if token_id in self._added:
            return self._added[token_id].decode("utf-8")
        return self._model.id_to_piece(token_id) if 0 <= token_id < self.piece_count else None

    def token_to_id(self, token: str) -> int | None:
        if token in self._added_ids:
            return self._added_ids[token]
        token_id: int = self._model.piece_to_id(token)
        return None if token_id == self._model.unk_id() else token_id


def _load_model(model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except Exception as error:  # the library raises RuntimeError and others
        raise CheckpointError(f"the SentencePiece model cannot be read: {error}") from error


def _cutting_pattern(tokens: Sequence[AddedToken]) -> re.Pattern[str] | None:
    if not tokens:
        return None
    longest_first = sorted(tokens, key=lambda token: len(token.text), reverse=True)
    return re.compile("|".join(
        (r"\s*" if token.lstrip else "") + re.escape(token.text) + (r"\s*" if token.rstrip else "")
        for token in longest_first
    ))  # fmt: skip


def make_bpe_model(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], space_prefix: bool) -> bytes:
    """A SentencePiece BPE model file from its table, as GGUF keeps it; normalisation is the identity.

    kinds: SentencePiece's piece types (1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte).
    Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    table = b"".join(
        _field(1, _field(1, piece.encode("utf-8")) + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind))
        for piece, score, kind in zip(pieces, scores, kinds, strict=True)
    )
    model_type_bpe, byte_fallback = b"\x18\x02", b"\x98\x02\x01"
    trainer = model_type_bpe + (byte_fallback if 6 in kinds else b"")
    keep_whitespace, escape_whitespace = b"\x20\x00", b"\x28\x01"
    normalizer = (
        _field(1, b"identity") + _ADD_DUMMY_PREFIX + _varint(int(space_prefix)) + keep_whitespace + escape_whitespace
    )
    return table + _field(2, trainer) + _field(3, normalizer)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload
