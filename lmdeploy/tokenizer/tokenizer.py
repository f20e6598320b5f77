"""The tokenizer that the rest of the package and its users see. It knows no file format beyond which reader to ask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmdeploy.errors import CheckpointError
from lmdeploy.local_file import refuse_pointer
from lmdeploy.tokenizer.settings import TokenizerSettings, read_settings
from lmdeploy.tokenizer.vocabulary import Vocabulary


@dataclass
class EncodedText:
    """What calling a tokenizer gives, as in LMDeploy 0.1."""

    input_ids: list[int]


class Tokenizer:
    """Text to token ids and back, from a checkpoint folder or a GGUF file.

    vocab_size: one more than the largest id; a model's embedding may be padded beyond it. eos_token_ids: every id that ends
    generation, eos_token_id first. chat_template: the model's Jinja, None if it brings none; chat_templates: all of them
    by name. special_tokens: ids by spelling. model_type: of config.json, or GGUF's architecture.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        vocabulary, settings = _load(self.path)
        self._vocabulary = vocabulary
        self.vocab_size: int = vocabulary.size
        self.special_tokens: dict[str, int] = vocabulary.special_tokens
        self.chat_templates: dict[str, str] = settings.chat_templates
        self.model_type = str(settings.config.get("model_type") or "")
        self.bos_token, self.bos_token_id = self._named(settings, "bos_token")
        self.eos_token, self.eos_token_id = self._named(settings, "eos_token")
        self.unk_token, _ = self._named(settings, "unk_token")
        self.pad_token, self.pad_token_id = self._named(settings, "pad_token")
        first = [] if self.eos_token_id is None else [self.eos_token_id]
        self.eos_token_ids: list[int] = list(dict.fromkeys(first + settings.eos_token_ids))
        self._prefix_ids, self._suffix_ids = self._surrounding_ids(settings)
        self._special_ids = frozenset(self.special_tokens.values())

    @classmethod
    def from_path(cls, path: str | Path) -> Tokenizer:
        """Read a folder (tokenizer.json, a SentencePiece tokenizer.model, a tiktoken file) or a GGUF file.

        Raises CheckpointError if there is no tokenizer, or it cannot be read.
        """
        return cls(path)

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    @property
    def strips_first_space(self) -> bool:
        """Whether encoding puts a space before a text, which decoding takes off again."""
        return self._vocabulary.strips_first_space

    def encode(self, text: str, add_bos: bool = True, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, in which special tokens are recognised by their spelling.

        add_bos: put what the tokenizer's own rule puts before a text, nothing if it has no such rule, and nothing if the
        text already begins with it. add_special_tokens=False: nothing before or after.
        """
        ids = self._vocabulary.encode(_without_surrogates(text))
        if not add_special_tokens:
            return ids
        prefix = self._prefix_ids if add_bos and tuple(ids[: len(self._prefix_ids)]) != self._prefix_ids else ()
        return [*prefix, *ids, *self._suffix_ids]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        to_bytes = self._vocabulary.token_to_bytes
        text = b"".join(to_bytes(i) for i in map(int, ids) if i not in skipped).decode("utf-8", "replace")
        return text[1:] if self.strips_first_space and text.startswith(" ") else text

    def token_to_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, as bytes; a special token's spelling."""
        return self._vocabulary.token_to_bytes(token_id)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (`Ġthe`, `▁the`), None outside the vocabulary."""
        return self._vocabulary.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, None if it is none."""
        return self._vocabulary.token_to_id(token)

    def is_special(self, token_id: int) -> bool:
        """Whether the token steers the model and is no part of an answer's text."""
        return token_id in self._special_ids

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True) -> EncodedText | list[EncodedText]:
        if isinstance(text, str):
            return EncodedText(self.encode(text, add_special_tokens=add_special_tokens))
        return [EncodedText(self.encode(one, add_special_tokens=add_special_tokens)) for one in text]

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path)!r}, vocab_size={self.vocab_size})"

    def _named(self, settings: TokenizerSettings, name: str) -> tuple[str | None, int | None]:
        """Spelling and id of a named token, either found from the other."""
        text = settings.named_tokens.get(name)
        token_id = settings.token_ids.get(name + "_id")
        if text is not None:
            known = self._vocabulary.token_to_id(text)
            return (text, known) if known is not None else (None, token_id)
        return (None if token_id is None else self._vocabulary.id_to_token(token_id)), token_id

    def _surrounding_ids(self, settings: TokenizerSettings) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The settings' rule; without one, the vocabulary file's."""
        prefix, suffix = self._vocabulary.prefix_ids, self._vocabulary.suffix_ids
        if settings.add_bos is not None and self.bos_token_id is not None:
            prefix = (self.bos_token_id,) if settings.add_bos else ()
        if settings.add_eos is not None and self.eos_token_id is not None:
            suffix = (self.eos_token_id,) if settings.add_eos else ()
        return prefix, suffix


def _without_surrogates(text: str) -> str:
    """Half a surrogate pair, which JSON can smuggle in and no encoder takes, becomes U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _load(path: Path) -> tuple[Vocabulary, TokenizerSettings]:
    # Each reader is imported only for its own files: none is small.
    if path.is_file():
        from lmdeploy.gguf_file import read_metadata
        from lmdeploy.tokenizer.gguf_vocabulary import build_gguf_vocabulary, read_gguf_settings

        metadata = read_metadata(path)
        return build_gguf_vocabulary(path, metadata), read_gguf_settings(metadata)
    if not path.is_dir():
        raise CheckpointError(f"{str(path)!r} is neither a folder nor a GGUF file; there is no tokenizer to read")
    if (path / "config.ini").exists():
        from lmdeploy.workspace import tokenizer_folder

        path = tokenizer_folder(path)
    settings = read_settings(path)
    for file in _candidates(path):
        refuse_pointer(file)
        return _load_file(file, settings), settings
    raise CheckpointError(
        f"{path} has no tokenizer: none of tokenizer.json, tokenizer.model, *.tiktoken is there. "
        "Copy the model's tokenizer files into the folder."
    )


def _candidates(folder: Path) -> list[Path]:
    named = [folder / "tokenizer.json", folder / "tokenizer.model", *sorted(folder.glob("*.tiktoken"))]
    return [file for file in named if file.is_file()]


def _load_file(file: Path, settings: TokenizerSettings) -> Vocabulary:
    if file.suffix == ".json":
        from lmdeploy.tokenizer.huggingface import HuggingFaceVocabulary

        return HuggingFaceVocabulary.from_file(file, settings.added_tokens)
    from lmdeploy.tokenizer.older_files import load_older_file

    return load_older_file(file, settings)
