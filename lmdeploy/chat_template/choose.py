"""Decides which chat template a model gets. It knows the templates only by name.

The user's choice comes first, then the model's own Jinja, then a named template by architecture and vocabulary. The path of
a model says nothing: a renamed folder is the same model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy.chat_template.base import ChatTemplate, Message, RenderOptions
from lmdeploy.errors import ConfigError

if TYPE_CHECKING:
    from lmdeploy.chat_template.config import ChatTemplateConfig
    from lmdeploy.tokenizer import Tokenizer


class UnknownTemplate(ChatTemplate):
    """Stands for the template of a model that brings none and is not recognised: text passes, a chat is refused."""

    name = "unknown"

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture
        self.stop_words = []

    def _render(self, messages: list[Message], options: RenderOptions) -> str:
        raise ConfigError(
            f"this model ({self._architecture}) brings no chat template and none is known for it. Name one with "
            "--chat-template NAME or ChatTemplateConfig(model_name=NAME), 'base' to pass text as it is; `lmdeploy list` "
            "shows the names"
        )


def choose_chat_template(
    path: str | Path, tokenizer: Tokenizer, hf_config: Mapping[str, Any], config: ChatTemplateConfig | str | None = None
) -> ChatTemplate:
    """The template of a model.

    path: its folder, of which only generation_config.json is read. hf_config: its config.json; empty for a GGUF file.
    config: what the user asked for: a name, a .json file of parts, a .jinja file, or a ChatTemplateConfig; None for the
    model's own. Raises ConfigError for an unknown name, file or part.
    """
    if not config:
        return choose_for_model(Path(path), tokenizer, hf_config)
    from lmdeploy.chat_template.requested import requested_template

    return requested_template(Path(path), tokenizer, hf_config, config)


def choose_for_model(path: Path, tokenizer: Tokenizer, hf_config: Mapping[str, Any]) -> ChatTemplate:
    """The template of a model for which the user asked for nothing."""
    # A model needs one kind of template: the other kind's module, and jinja2 with it, is then never loaded.
    if tokenizer.chat_templates:
        from lmdeploy.chat_template.jinja import JinjaTemplate

        return JinjaTemplate(tokenizer.chat_templates, tokenizer)
    from lmdeploy.chat_template.guess import guess_template_name

    name = guess_template_name(hf_config, tokenizer)
    if name is None:
        architectures = hf_config.get("architectures") or [tokenizer.model_type or "of unknown architecture"]
        return UnknownTemplate(str(architectures[0]))
    from lmdeploy.chat_template.named import make_for_model

    return make_for_model(name, path)
