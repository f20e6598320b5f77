"""What a checkpoint's JSON files say about its tokenizer: special tokens, begin and end, chat templates. It encodes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmdeploy.errors import CheckpointError
from lmdeploy.tokenizer.vocabulary import AddedToken

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# Slow classes of transformers whose `legacy` flag decides where the leading space goes.
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")


@dataclass
class TokenizerSettings:
    """Settings by their meaning, whichever file they came from; None where no file says.

    named_tokens: bos_token, eos_token, unk_token, pad_token by name. token_ids: the same ids as numbers from config.json.
    chat_templates: Jinja by name, "default" among them if there is any. eos_token_ids: every id that ends generation.
    config: config.json.
    """

    named_tokens: dict[str, str] = field(default_factory=dict)
    token_ids: dict[str, int] = field(default_factory=dict)
    add_bos: bool | None = None
    add_eos: bool | None = None
    added_tokens: list[AddedToken] = field(default_factory=list)
    extra_special: set[str] = field(default_factory=set)
    eos_token_ids: list[int] = field(default_factory=list)
    chat_templates: dict[str, str] = field(default_factory=dict)
    tokenizer_class: str = ""
    space_before: str = "every"
    config: dict[str, Any] = field(default_factory=dict)


def read_settings(folder: Path) -> TokenizerSettings:
    """Gather a folder's tokenizer settings; raises CheckpointError for a file that is no JSON object."""
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    special_map = _read_json(folder / "special_tokens_map.json")
    config = _read_json(folder / "config.json")
    generation = _read_json(folder / "generation_config.json")
    settings = TokenizerSettings(config=config)
    settings.tokenizer_class = str(tokenizer_config.get("tokenizer_class") or "")
    for name in _NAMED_TOKENS:
        text = _spelling(tokenizer_config.get(name)) or _spelling(special_map.get(name))
        if text:
            settings.named_tokens[name] = text
    for name in ("bos_token_id", "eos_token_id"):
        ids = _as_ids(generation.get(name)) or _as_ids(config.get(name))
        if ids:
            settings.token_ids[name] = ids[0]
    settings.eos_token_ids = _as_ids(generation.get("eos_token_id")) or _as_ids(config.get("eos_token_id"))
    settings.add_bos = _as_bool(tokenizer_config.get("add_bos_token"))
    settings.add_eos = _as_bool(tokenizer_config.get("add_eos_token"))
    settings.extra_special = _extra_special(tokenizer_config, special_map)
    settings.added_tokens = _read_added(folder, tokenizer_config, settings)
    settings.chat_templates = _read_templates(folder, tokenizer_config)
    if settings.tokenizer_class in _LLAMA_CLASSES and tokenizer_config.get("legacy") is False:
        settings.space_before = "first"
    return settings


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not {type(value).__name__}")
    return value


def _spelling(token: Any) -> str | None:
    """A token given as text or as an AddedToken object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _as_ids(value: Any) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    return [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _as_bool(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _extra_special(*files: Mapping[str, Any]) -> set[str]:
    names: set[str] = set()
    for values in files:
        listed = values.get("additional_special_tokens") or []
        found = [*listed] if isinstance(listed, list) else []
        names.update(text for text in map(_spelling, [*found, *(values.get(name) for name in _NAMED_TOKENS)]) if text)
    return names


def _read_added(folder: Path, tokenizer_config: Mapping[str, Any], settings: TokenizerSettings) -> list[AddedToken]:
    """added_tokens.json, overruled by tokenizer_config.json's added_tokens_decoder."""
    tokens: dict[int, AddedToken] = {}
    for text, token_id in _read_json(folder / "added_tokens.json").items():
        if isinstance(token_id, int):
            tokens[token_id] = AddedToken(token_id, text, special=text in settings.extra_special)
    decoder = tokenizer_config.get("added_tokens_decoder")
    for key, entry in (decoder if isinstance(decoder, Mapping) else {}).items():
        if not (key.isdigit() and isinstance(entry, Mapping) and _spelling(entry)):
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: added_tokens_decoder has the entry {key!r}: {entry!r}"
            )
        names = ("lstrip", "rstrip", "normalized", "single_word")
        flags = {name: bool(entry.get(name, False)) for name in names}
        special = bool(entry.get("special", False)) or entry["content"] in settings.extra_special
        tokens[int(key)] = AddedToken(int(key), entry["content"], special, **flags)
    return list(tokens.values())


def _read_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Jinja templates by name. A file beside the config, the newer place, outranks the config's own."""
    templates = _named_templates(_read_json(folder / "chat_template.json").get("chat_template"))
    templates |= _named_templates(tokenizer_config.get("chat_template"))
    extra = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for path in [folder / "chat_template.jinja", *extra]:
        if path.is_file():
            name = "default" if path.name == "chat_template.jinja" else path.stem
            templates[name] = path.read_text(encoding="utf-8")
    return templates


def _named_templates(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    entries: Iterable[Any] = value if isinstance(value, list) else ()
    return {
        entry["name"]: entry["template"]
        for entry in entries
        if isinstance(entry, Mapping) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
    }
