"""The chat template that a user asks for: by name, by its parts, or as a file. It knows the templates only by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lmdeploy.chat_template.base import ChatTemplate
from lmdeploy.chat_template.choose import choose_for_model
from lmdeploy.chat_template.config import ChatTemplateConfig
from lmdeploy.chat_template.guess import guess_template_name
from lmdeploy.chat_template.named import make_for_model
from lmdeploy.errors import ConfigError
from lmdeploy.tokenizer import Tokenizer

# What can be changed about a model's own Jinja; any other part asks for a template made of parts.
_JINJA_PARTS = frozenset({"meta_instruction", "stop_words", "capability"})


def requested_template(
    path: Path, tokenizer: Tokenizer, hf_config: Mapping[str, Any], config: ChatTemplateConfig | str
) -> ChatTemplate:
    """As choose_chat_template, where the user did ask for something."""
    if isinstance(config, str):
        if config.endswith(".jinja"):
            return _make_jinja({"default": _read_text(config)}, tokenizer, {})
        config = ChatTemplateConfig.from_json(config) if config.endswith(".json") else ChatTemplateConfig(config)
    parts = {name: value for name, value in asdict(config).items() if value is not None}
    name, source = parts.pop("model_name", None), parts.pop("model_path", None)
    if source is not None:
        tokenizer = Tokenizer(source)
    if name is None:
        return _change_parts(path, tokenizer, hf_config, parts)
    if name != "hf":
        return make_for_model(name, path, **parts)
    if not tokenizer.chat_templates:
        raise ConfigError(f"--chat-template hf asks for the model's own template, but {path} brings none; give a name")
    return _make_jinja(tokenizer.chat_templates, tokenizer, parts)


def _change_parts(
    path: Path, tokenizer: Tokenizer, hf_config: Mapping[str, Any], parts: dict[str, Any]
) -> ChatTemplate:
    """The model's template with other parts."""
    if parts.get("capability") == "infilling":
        return make_for_model("codellama", path, **parts)
    if tokenizer.chat_templates and set(parts) <= _JINJA_PARTS:
        return _make_jinja(tokenizer.chat_templates, tokenizer, parts)
    name = guess_template_name(hf_config, tokenizer)
    if name is not None:
        return make_for_model(name, path, **parts)
    if set(parts) - _JINJA_PARTS or parts.get("capability") in ("completion", "python"):
        return make_for_model("custom", path, **parts)
    return choose_for_model(path, tokenizer, hf_config)


def _make_jinja(sources: Mapping[str, str], tokenizer: Tokenizer, parts: dict[str, Any]) -> ChatTemplate:
    from lmdeploy.chat_template.jinja import JinjaTemplate

    if set(parts) - _JINJA_PARTS:
        raise ConfigError(
            f"parts {sorted(set(parts) - _JINJA_PARTS)} cannot be changed in a Jinja template, only "
            f"{sorted(_JINJA_PARTS)}; leave model_name out or name a template made of parts"
        )
    return JinjaTemplate(
        sources,
        tokenizer,
        default_system=parts.get("meta_instruction"),
        stop_words=parts.get("stop_words"),
        capability=parts.get("capability", "chat"),
    )


def _read_text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat template file {file!r} cannot be read: {error}") from error
