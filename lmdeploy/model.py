"""LMDeploy's import path for chat templates (`from lmdeploy.model import MODELS, ChatTemplateConfig`). It adds no template.

A class registered by old code keeps working: its `messages2prompt` is what renders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lmdeploy.chat_template.base import Message, RenderOptions
from lmdeploy.chat_template.config import ChatTemplateConfig
from lmdeploy.chat_template.messages import check_messages
from lmdeploy.chat_template.named import CHAT_TEMPLATES, TemplateSource, find_template, register_chat_template
from lmdeploy.chat_template.turns import TurnTemplate

__all__ = ["MODELS", "BaseChatTemplate", "BaseModel", "ChatTemplateConfig"]

_Source = TypeVar("_Source", bound=TemplateSource)


@dataclass(kw_only=True)
class BaseChatTemplate(TurnTemplate):
    """Base of users' template classes; override `messages2prompt`, or only pass the parts to `__init__`."""

    def messages2prompt(
        self, messages: str | Sequence[Message], sequence_start: bool = True, tools: list[dict[str, Any]] | None = None
    ) -> str:
        """The prompt of one text or of messages."""
        if isinstance(messages, str):
            return self.get_prompt(messages, sequence_start)
        return super()._render(check_messages(messages), RenderOptions(tools=tools))

    def _render(self, messages: list[Message], options: RenderOptions) -> str:
        if type(self).messages2prompt is BaseChatTemplate.messages2prompt:
            return super()._render(messages, options)
        return self.messages2prompt(
            messages, sequence_start=True, **({"tools": options.tools} if options.tools else {})
        )


BaseModel = BaseChatTemplate


class _Registry:
    """The named templates behind the interface of LMDeploy's registry."""

    @property
    def module_dict(self) -> dict[str, TemplateSource]:
        return CHAT_TEMPLATES

    def get(self, name: str) -> TemplateSource | None:
        """The class or factory of a name or alias, None if there is none."""
        return find_template(name)

    def register_module(self, name: str | list[str]) -> Callable[[_Source], _Source]:
        """Decorator that adds a template class under one or more names."""
        return register_chat_template(*([name] if isinstance(name, str) else name))


MODELS = _Registry()
