"""A tiktoken vocabulary file (base64 token and rank a line): Qwen, Llama 3, GLM-4, DBRX. It knows no other format.

The file holds neither the splitting expression nor the special tokens; both are facts of the family, kept here as data.
"""

from __future__ import annotations

import base64
import binascii
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken

from lmdeploy.errors import CheckpointError
from lmdeploy.tokenizer import patterns
from lmdeploy.tokenizer.added_tokens import AddedToken
from lmdeploy.tokenizer.vocabulary import Vocabulary

_SLICE_CHARS = 25_000


@dataclass(frozen=True)
class TiktokenFamily:
    """How a family splits text and which special tokens it has, numbered from the end of the file's ranks.

    list_special takes config.json. prefix, bos, eos are spellings of special tokens; model_types and rank_count
    recognise the family.
    """

    pattern: str
    list_special: Callable[[Mapping[str, Any]], Sequence[str]]
    model_types: tuple[str, ...]
    rank_count: int
    bos: str | None = None
    eos: str | None = None
    prefix: tuple[str, ...] = ()
    composes_unicode: bool = False


def _qwen_tokens(config: Mapping[str, Any]) -> list[str]:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
    if "visual" in config:  # in Qwen without pictures `<img>` is HTML
        tokens += ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"]
    return tokens


def _llama3_tokens(config: Mapping[str, Any]) -> list[str]:
    head = "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id step_id"
    turn = "start_header_id end_header_id eom_id eot_id python_tag"
    named = [f"<|{name}|>" for name in (head + " " + turn).split()]
    return named + [f"<|reserved_special_token_{i}|>" for i in range(2, 256 - len(named) + 2)]


def _glm4_tokens(config: Mapping[str, Any]) -> list[str]:
    marks = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
    media = ["begin_of_image", "end_of_image", "begin_of_video", "end_of_video"]
    return marks + [f"<|{name}|>" for name in ("system", "user", "assistant", "observation", *media)]


def _cl100k_tokens(config: Mapping[str, Any]) -> list[str]:
    unused = [f"<||_unused_{i}_||>" for i in range(16)]
    head = [unused[0], "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
    return [*head, *unused[1:], "<|endofprompt|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]


FAMILIES: dict[str, TiktokenFamily] = {
    "qwen": TiktokenFamily(patterns.QWEN2, _qwen_tokens, ("qwen",), 151643, eos="<|endoftext|>", composes_unicode=True),
    "llama3": TiktokenFamily(
        patterns.LLAMA3,
        _llama3_tokens,
        ("llama",),
        rank_count=128000,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        prefix=("<|begin_of_text|>",),
    ),
    "glm4": TiktokenFamily(
        patterns.LLAMA3,
        _glm4_tokens,
        ("chatglm", "glm", "glm4"),
        rank_count=151329,
        eos="<|endoftext|>",
        prefix=("[gMASK]", "<sop>"),
    ),
    "cl100k": TiktokenFamily(patterns.LLAMA3, _cl100k_tokens, ("dbrx",), 100256, eos="<|endoftext|>"),
}


def is_tiktoken_file(path: Path) -> bool:
    """Whether the first line is a base64 token and a rank; a SentencePiece model is binary."""
    with open(path, "rb") as file:
        parts = file.readline(4096).split()
    try:
        return len(parts) == 2 and parts[1].isdigit() and bool(base64.b64decode(parts[0], validate=True))
    except binascii.Error:
        return False


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes to rank; raises CheckpointError naming the line that is none."""
    ranks: dict[bytes, int] = {}
    line = b""
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token)] = int(rank)
    except ValueError as error:  # binascii.Error is one
        raise CheckpointError(f"{path}: {line[:80]!r} is not a base64 token and a rank; get the file again") from error
    return ranks


def choose_family(path: Path, rank_count: int, model_type: str) -> TiktokenFamily:
    """The family by the number of ranks, else by the config's model_type, else by the file name `qwen.tiktoken`."""
    for family in FAMILIES.values():
        if family.rank_count == rank_count:
            return family
    for name, family in FAMILIES.items():
        if model_type in family.model_types or path.name == f"{name}.tiktoken":
            return family
    known = ", ".join(f"{name} ({family.rank_count} ranks)" for name, family in FAMILIES.items())
    raise CheckpointError(
        f"{path} has {rank_count} ranks and model_type {model_type!r}: a tiktoken vocabulary of unknown family, so its "
        f"splitting rule is unknown; known are {known}. Put the model's tokenizer.json beside it."
    )


class TiktokenVocabulary(Vocabulary):
    """tiktoken's own encoder over a file's ranks, the family's special tokens and those that a checkpoint adds."""

    def __init__(self, path: Path, config: Mapping[str, Any], added: Sequence[AddedToken] = ()) -> None:
        ranks = read_ranks(path)
        family = choose_family(path, len(ranks), str(config.get("model_type", "")))
        special = {token: len(ranks) + i for i, token in enumerate(family.list_special(config))}
        taken = {token.id for token in added}
        special = {text: token_id for text, token_id in special.items() if token_id not in taken}
        every = special | {token.text: token.id for token in added}
        self._encoding = tiktoken.Encoding(
            name=path.name, pat_str=family.pattern, mergeable_ranks=ranks, special_tokens=every
        )
        plain_words = {token.text for token in added if not token.is_found_in_text}
        self._found_in_text = set(every) - plain_words
        self._added_ids = every
        self.special_tokens = special | {token.text: token.id for token in added if token.special}
        self.size = self._encoding.max_token_value + 1
        self.family = family
        self.prefix_ids = tuple(every[token] for token in family.prefix if token in every)

    def encode(self, text: str) -> list[int]:
        if self.family.composes_unicode:
            text = unicodedata.normalize("NFC", text)
        try:
            return self._encode(text)
        except ValueError:  # the expression ran out of stack, as on a million spaces
            slices = (text[i : i + _SLICE_CHARS] for i in range(0, len(text), _SLICE_CHARS))
            return [token_id for part in slices for token_id in self._encode(part)]

    def _encode(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special=self._found_in_text, disallowed_special=())

    def token_to_bytes(self, token_id: int) -> bytes:
        try:
            return self._encoding.decode_single_token_bytes(token_id)
        except (KeyError, OverflowError):  # a hole, or an id below 0
            return b""

    def id_to_token(self, token_id: int) -> str | None:
        return self.token_to_bytes(token_id).decode("utf-8", "replace") or None

    def token_to_id(self, token: str) -> int | None:
        if token in self._added_ids:
            return self._added_ids[token]
        try:
            return self._encoding.encode_single_token(token)
        except KeyError:
            return None
