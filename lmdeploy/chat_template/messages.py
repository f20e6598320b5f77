"""The one form of messages that every chat template takes. It renders nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmdeploy.errors import InvalidParameter

_NO_VISION = "{}: vision models are not supported yet, give text only"


def check_form(prompt: object) -> None:
    """Raise InvalidParameter unless these are messages, and of text; their details are the template's to judge."""
    if isinstance(prompt, tuple):
        raise InvalidParameter(_NO_VISION.format("the prompt is a tuple of text and images"))
    if not isinstance(prompt, Sequence) or not prompt or not all(isinstance(item, Mapping) for item in prompt):
        raise InvalidParameter(
            f"a prompt of type {type(prompt).__name__}: give a str, a list of messages such as "
            "[{'role': 'user', 'content': 'Hi'}], or a list of token ids"
        )
    for message in prompt:
        content = message.get("content")
        for part in content if isinstance(content, Sequence) and not isinstance(content, str) else ():
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text":
                raise InvalidParameter(_NO_VISION.format(f"a message holds a part of type {kind!r}"))


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages with a string or None as content; raises InvalidParameter naming the first that is wrong.

    Text parts are joined by line breaks. Parts of another type stay, for the templates of vision-language models.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidParameter(f"messages={messages!r}: give a list of at least one message with role and content")
    return [_check_message(i, message) for i, message in enumerate(messages)]


def _check_message(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidParameter(f"messages[{index}]={message!r}: a message is a mapping with a role and a content")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        if all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            content = "\n".join(part["text"] for part in content)
    elif content is not None and not isinstance(content, str):
        raise InvalidParameter(f"messages[{index}]: content is {type(content).__name__}, not text or a list of parts")
    return {**message, "content": content}
