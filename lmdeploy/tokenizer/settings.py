"""What a checkpoint's JSON files say about its tokenizer: special tokens, begin and end, chat templates. It encodes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy.local_file import read_json

if TYPE_CHECKING:
    from lmdeploy.tokenizer.added_tokens import AddedToken

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
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
    eos_token_ids: list[int] = field(default_factory=list)
    chat_templates: dict[str, str] = field(default_factory=dict)
    tokenizer_class: str = ""
    space_before: str = "every"
    config: dict[str, Any] = field(default_factory=dict)


def read_settings(folder: Path) -> TokenizerSettings:
    """Gather a folder's tokenizer settings; raises CheckpointError for a file that is no JSON object."""
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    special_map = read_json(folder / "special_tokens_map.json")
    config = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json")
    settings = TokenizerSettings(config=config)
    settings.tokenizer_class = str(tokenizer_config.get("tokenizer_class") or "")
    for name in NAMED_TOKENS:
        text = spelling(tokenizer_config.get(name)) or spelling(special_map.get(name))
        if text:
            settings.named_tokens[name] = text
    for name in ("bos_token_id", "eos_token_id"):
        ids = _as_ids(generation.get(name)) or _as_ids(config.get(name))
        if ids:
            settings.token_ids[name] = ids[0]
    settings.eos_token_ids = _as_ids(generation.get("eos_token_id")) or _as_ids(config.get("eos_token_id"))
    settings.add_bos = _as_bool(tokenizer_config.get("add_bos_token"))
    settings.add_eos = _as_bool(tokenizer_config.get("add_eos_token"))
    if "added_tokens_decoder" in tokenizer_config or (folder / "added_tokens.json").exists():
        from lmdeploy.tokenizer.added_tokens import read_added

        settings.added_tokens = read_added(folder, tokenizer_config, special_map)
    settings.chat_templates = _read_templates(folder, tokenizer_config)
    if settings.tokenizer_class in _LLAMA_CLASSES and tokenizer_config.get("legacy") is False:
        settings.space_before = "first"
    return settings


def spelling(token: Any) -> str | None:
    """A token given as text or as an AddedToken object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _as_ids(value: Any) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    return [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0]


def _as_bool(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _read_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Jinja templates by name. A file beside the config, the newer place, outranks the config's own."""
    templates = _named_templates(read_json(folder / "chat_template.json").get("chat_template"))
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
