"""Prompts that end or begin in mid-conversation, cut out of what a template renders. It knows no template."""

from __future__ import annotations

from dataclasses import replace

from lmdeploy.chat_template.base import ChatTemplate, Message, RenderOptions
from lmdeploy.errors import InvalidParameter

# Stands where an answer ends while its prompt is rendered. Private-use characters: no template trims them.
_CUT = "\ue0f0cut\ue0f1"


def render_unfinished(template: ChatTemplate, messages: list[Message], options: RenderOptions) -> str:
    """The prompt up to the end of the last message, an assistant's. Raises InvalidParameter for any other."""
    last = messages[-1]
    if last["role"] != "assistant" or not isinstance(last["content"], str):
        raise InvalidParameter(
            f"continue_final_message: the last message, the {last['role']}'s, is no answer to go on from"
        )
    marked = [*messages[:-1], {**last, "content": last["content"] + _CUT}]
    text = template._render(marked, replace(options, add_generation_prompt=False))
    if _CUT not in text:
        raise InvalidParameter(
            f"chat template {template.name!r} cannot continue the final message: it rewrites its content"
        )
    return text.rpartition(_CUT)[0]


def render_later_turn(template: ChatTemplate, text: str) -> str:
    """What follows an answer that the engine still holds: its end, and a user's turn."""
    before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _CUT}]
    return template.render([*before, {"role": "user", "content": text}]).rpartition(_CUT)[2]
