"""Chat messages to prompts: the model's own Jinja first, then named templates. It knows no engine and no HTTP."""

from __future__ import annotations

from lmdeploy.chat_template.base import ChatTemplate
from lmdeploy.chat_template.choose import choose_chat_template
from lmdeploy.chat_template.named import CHAT_TEMPLATES, register_chat_template
from lmdeploy.chat_template.turns import TurnTemplate

__all__ = ["CHAT_TEMPLATES", "ChatTemplate", "TurnTemplate", "choose_chat_template", "register_chat_template"]
