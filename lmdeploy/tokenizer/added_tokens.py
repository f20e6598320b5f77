"""Tokens beside the trained vocabulary: how a checkpoint's JSON files name them, and how a tokenizer learns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from lmdeploy.errors import CheckpointError
from lmdeploy.local_file import read_json
from lmdeploy.logging import get_logger
from lmdeploy.tokenizer.settings import NAMED_TOKENS, spelling


@dataclass(frozen=True)
class AddedToken:
    """A token beside the trained vocabulary, found in text before anything else is split.

    special: it steers the model and is no part of an answer's text. lstrip, rstrip: it swallows the white space before,
    after it.
    """

    id: int
    text: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False

    @property
    def is_found_in_text(self) -> bool:
        """False for a plain word: ChatGLM's `sop` is a token, but must not be cut out of `philosophy`."""
        return not self.text.isalpha()


def _extra_special(*files: Mapping[str, Any]) -> set[str]:
    names: set[str] = set()
    for values in files:
        listed = values.get("additional_special_tokens") or []
        found = [*listed] if isinstance(listed, list) else []
        names.update(text for text in map(spelling, [*found, *(values.get(name) for name in NAMED_TOKENS)]) if text)
    return names


def read_added(folder: Path, tokenizer_config: Mapping[str, Any], special_map: Mapping[str, Any]) -> list[AddedToken]:
    """added_tokens.json, overruled by tokenizer_config.json's added_tokens_decoder."""
    extra_special = _extra_special(tokenizer_config, special_map)
    tokens: dict[int, AddedToken] = {}
    for text, token_id in read_json(folder / "added_tokens.json").items():
        if isinstance(token_id, int):
            tokens[token_id] = AddedToken(token_id, text, special=text in extra_special)
    decoder = tokenizer_config.get("added_tokens_decoder")
    for key, entry in (decoder if isinstance(decoder, Mapping) else {}).items():
        if not (key.isdigit() and isinstance(entry, Mapping) and spelling(entry)):
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has the entry {key!r}: {entry!r}"
            )
        names = ("lstrip", "rstrip", "normalized", "single_word")
        flags = {name: bool(entry.get(name, False)) for name in names}
        special = bool(entry.get("special", False)) or entry["content"] in extra_special
        tokens[int(key)] = AddedToken(int(key), entry["content"], special, **flags)
    return list(tokens.values())


def add_missing(tokenizer: tokenizers.Tokenizer, added: Sequence[AddedToken]) -> None:
    """Register tokens that only `tokenizer_config.json` names; the library numbers them, so the order is by id."""
    present = tokenizer.get_added_tokens_decoder()
    for token in sorted(added, key=lambda token: token.id):
        if token.id in present:
            continue
        flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": token.normalized}
        entry = tokenizers.AddedToken(token.text, single_word=token.single_word, special=token.special, **flags)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([entry])
        if tokenizer.token_to_id(token.text) != token.id:
            get_logger().warning("added token %r should have id %d, the vocabulary gives %s", token.text, token.id,
                            tokenizer.token_to_id(token.text))  # fmt: skip
