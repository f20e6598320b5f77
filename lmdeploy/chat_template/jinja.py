"""Chat templates that models bring along as Jinja. It knows neither where the source came from nor the named templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jinja2

from lmdeploy.chat_template.base import ChatTemplate, Message, RenderOptions
from lmdeploy.chat_template.sandbox import MAX_SOURCE_CHARS, TemplateEnvironment, limit_time
from lmdeploy.errors import CheckpointError, InvalidParameter

if TYPE_CHECKING:
    from lmdeploy.tokenizer import Tokenizer

_ENDS_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endofturn|>", "<|eot|>", "<eoa>")
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", *_TOKENS})


class JinjaTemplate(ChatTemplate):
    """The template a model was released with, rendered as `transformers.apply_chat_template` renders it.

    sources: Jinja by name; "tool_use" is taken when tools are given, else "default". default_system: a system message put
    first if the conversation has none. stop_words: by default the end-of-turn tokens of the vocabulary that the source
    spells, since generation settings of base models name only the end of a document.
    """

    name = "hf"

    def __init__(
        self,
        sources: Mapping[str, str],
        tokenizer: Tokenizer,
        *,
        default_system: str | None = None,
        stop_words: list[str] | None = None,
        capability: str = "chat",
    ) -> None:
        environment = TemplateEnvironment()
        self._templates = {name: _compile(environment, name, source) for name, source in sources.items()}
        self._tokens = {name: text for name in _TOKENS if (text := getattr(tokenizer, name)) is not None}
        self._default_system = default_system
        self.capability = capability
        source = "".join(sources.values())
        self.stop_words = _find_ends(source, tokenizer) if stop_words is None else list(stop_words)

    def _render(self, messages: list[Message], options: RenderOptions) -> str:
        refused = sorted(_RESERVED & set(options.variables))
        if refused:
            raise InvalidParameter(f"chat template variables {refused} are set by the server and cannot be passed")
        if self._default_system is not None and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": self._default_system}, *messages]
        template = self._templates.get("tool_use") if options.tools else None
        template = template or self._templates.get("default") or next(iter(self._templates.values()))
        try:
            with limit_time():
                return template.render(
                    messages=[_with_parsed_arguments(message) for message in messages],
                    tools=options.tools or None,
                    documents=None,
                    add_generation_prompt=options.add_generation_prompt,
                    **self._tokens,
                    **options.variables,
                )
        except jinja2.TemplateError as error:
            raise InvalidParameter(
                f"the model's chat template refuses these messages: {error.message or error}"
            ) from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, MemoryError) as error:
            raise InvalidParameter(f"the model's chat template fails on these messages: {error}") from error
        except RecursionError as error:
            raise InvalidParameter("the model's chat template calls itself without end") from error

    def _ids(self, messages: list[Message], tokenizer: Tokenizer, options: RenderOptions) -> list[int]:
        # The template itself spells the begin token where the model wants one.
        return tokenizer.encode(self._text(messages, options), add_special_tokens=self.capability != "chat")


def _compile(environment: TemplateEnvironment, name: str, source: str) -> jinja2.Template:
    hint = "pass --chat-template NAME or a .jinja file to use another one"
    if len(source) > MAX_SOURCE_CHARS:
        raise CheckpointError(f"the model's chat template {name!r} has {len(source)} characters; {hint}")
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
        raise CheckpointError(f"the model's chat template {name!r} cannot be compiled: {error}; {hint}") from error


def _find_ends(source: str, tokenizer: Tokenizer) -> list[str]:
    ends = [word for word in _ENDS_OF_TURN if word in source and word in tokenizer.special_tokens]
    if "<|return|>" in tokenizer.special_tokens:  # gpt-oss: one answer is several messages, each closed by <|end|>
        ends = [word for word in ends if word != "<|end|>"]
    return ends


def _with_parsed_arguments(message: Message) -> Message:
    """Tool calls with their arguments as an object, as templates expect them; OpenAI's API has them as JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_parse_call(call) for call in calls]}


def _parse_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
