"""Chat messages to prompts: the model's own Jinja first, then named templates. It knows no engine and no HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmdeploy.chat_template.base import ChatTemplate
from lmdeploy.chat_template.choose import choose_chat_template

if TYPE_CHECKING:
    from lmdeploy.chat_template.named import CHAT_TEMPLATES, register_chat_template
    from lmdeploy.chat_template.turns import TurnTemplate

__all__ = ["CHAT_TEMPLATES", "ChatTemplate", "TurnTemplate", "choose_chat_template", "register_chat_template"]


def __getattr__(name: str) -> Any:
    # Models that bring their own template need no named one.
    if name in __all__:
        from lmdeploy.chat_template import named, turns

        return getattr(turns if name == "TurnTemplate" else named, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
