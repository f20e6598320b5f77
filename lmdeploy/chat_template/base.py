"""What every chat template does. It knows no template."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdeploy.tokenizer import Tokenizer

Message = dict[str, Any]


@dataclass(frozen=True)
class RenderOptions:
    """The arguments of render, in one piece. variables: what a Jinja template sees besides the messages."""

    add_generation_prompt: bool = True
    tools: list[dict[str, Any]] | None = None
    continue_final_message: bool = False
    variables: dict[str, Any] = field(default_factory=dict)


DEFAULT_OPTIONS = RenderOptions()


class ChatTemplate(ABC):
    """Turns messages into the prompt a model was trained on.

    name: what `lmdeploy list` and `--chat-template` call it. stop_words: strings that end an answer. capability: "chat", or
    "completion" and "python", which leave text as it is, or "infilling".
    """

    name: str = ""
    stop_words: list[str]
    capability: str = "chat"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The prompt as text, special tokens spelled out.

        messages: OpenAI's form, content a string or a list of text parts. enable_thinking and template_kwargs become
        variables of a Jinja template; named templates take none. continue_final_message: end inside the last message, an
        assistant's, so that the answer goes on from it. Raises InvalidParameter for messages the template cannot express.
        """
        variables = (
            template_kwargs if enable_thinking is None else {**template_kwargs, "enable_thinking": enable_thinking}
        )
        options = RenderOptions(add_generation_prompt, tools, continue_final_message, variables)
        from lmdeploy.chat_template.messages import check_messages

        return self._text(check_messages(messages), options)

    def render_ids(
        self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, options: RenderOptions = DEFAULT_OPTIONS
    ) -> list[int]:
        """The prompt as ids, with begin tokens where the model wants them; options: the arguments of render."""
        from lmdeploy.chat_template.messages import check_messages

        return self._ids(check_messages(messages), tokenizer, options)

    @abstractmethod
    def _render(self, messages: list[Message], options: RenderOptions) -> str:
        """The prompt of checked messages, whatever the capability; continue_final_message is taken care of."""

    def _ids(self, messages: list[Message], tokenizer: Tokenizer, options: RenderOptions) -> list[int]:
        return tokenizer.encode(self._text(messages, options))

    def _text(self, messages: list[Message], options: RenderOptions) -> str:
        if self.capability in ("completion", "python"):
            return "".join(message["content"] or "" for message in messages)
        if not options.continue_final_message:
            return self._render(messages, options)
        from lmdeploy.chat_template.continuation import render_unfinished

        return render_unfinished(self, messages, options)

    def prompt(self, text: str) -> str:
        """The prompt of one user turn."""
        return self.render([{"role": "user", "content": text}])

    def get_prompt(self, text: str, sequence_start: bool = True) -> str:
        """As `prompt`; with sequence_start=False, what follows an answer that the engine still holds (LMDeploy 0.1)."""
        if sequence_start or self.capability != "chat":
            return self.prompt(text)
        from lmdeploy.chat_template.continuation import render_later_turn

        return render_later_turn(self, text)

    def stop_token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Ids of the stop words that are single tokens; the others have to be found in the text."""
        ids = []
        for word in self.stop_words:
            encoded = tokenizer.encode(word, add_special_tokens=False)
            if len(encoded) == 1 and tokenizer.token_to_bytes(encoded[0]) == word.encode("utf-8"):
                ids.append(encoded[0])
        return list(dict.fromkeys(ids))
