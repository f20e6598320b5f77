"""The body of /v1/responses and its way into a chat's. It knows neither the answer nor the store."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from lmdeploy.errors import InvalidParameter
from lmdeploy.serve.openai.pieces import chat_request
from lmdeploy.serve.openai.protocol import MAX_TEXT, ChatRequest, Count, Sampling, Text

MAX_ITEMS = 4096
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_SAMPLING = tuple(name for name in Sampling.model_fields if name != "n")

Message = dict[str, Any]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class TextOptions(_Part):
    format: dict[str, Any] | None = None
    verbosity: Annotated[StrictStr, Field(max_length=16)] | None = None


class Reasoning(_Part):
    effort: Annotated[StrictStr, Field(max_length=16)] | None = None
    summary: Annotated[StrictStr, Field(max_length=16)] | None = None


class ResponsesRequest(Sampling):
    """The Responses interface of OpenAI; sampling fields beyond its own are those of chat."""

    model: Annotated[StrictStr, Field(max_length=4096)]
    input: Text | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    stream: StrictBool = False
    store: StrictBool | None = None
    previous_response_id: Annotated[StrictStr, Field(max_length=128)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=256)] | None = None
    tool_choice: Annotated[StrictStr, Field(max_length=64)] | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    include: Annotated[list[Annotated[StrictStr, Field(max_length=128)]], Field(max_length=32)] | None = None
    metadata: Annotated[dict[str, Annotated[StrictStr, Field(max_length=512)]], Field(max_length=16)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: StrictBool | None = None
    conversation: Any = None
    prompt: Any = None
    user: Annotated[StrictStr, Field(max_length=1024)] | None = None
    enable_thinking: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=32)

    @property
    def wants_logprobs(self) -> bool:
        return self.top_logprobs is not None or "message.output_text.logprobs" in (self.include or [])


def to_chat(body: ResponsesRequest, said: list[Message]) -> ChatRequest:
    """The chat that this request is. said: the conversation so far, its own input included, without instructions."""
    _refuse(body)
    fields = {name: getattr(body, name) for name in _SAMPLING if name in body.model_fields_set}
    return chat_request(
        {
            **fields,
            "model": body.model,
            "messages": _with_instructions(body.instructions, said),
            "max_completion_tokens": body.max_output_tokens,
            "stream": body.stream,
            "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
            "tool_choice": _tool_choice(body.tool_choice) if body.tools else None,
            "parallel_tool_calls": body.parallel_tool_calls if body.tools else None,
            "response_format": _response_format(body.text),
            "reasoning_effort": body.reasoning.effort if body.reasoning else None,
            "logprobs": True if body.wants_logprobs else None,
            "top_logprobs": body.top_logprobs,
            "enable_thinking": body.enable_thinking,
            "chat_template_kwargs": body.chat_template_kwargs,
            "user": body.user,
        }
    )


def _refuse(body: ResponsesRequest) -> None:
    if body.n not in (None, 1):
        raise InvalidParameter(f"n={body.n}: this endpoint gives one answer")
    for name in ("background", "conversation", "prompt"):
        if getattr(body, name):
            raise InvalidParameter(f"{name} is not supported: leave it out")
    if body.truncation == "auto":
        raise InvalidParameter("truncation='auto' is not supported: shorten the input, or leave it out")


def input_messages(given: str | list[dict[str, Any]]) -> list[Message]:
    """Input items as chat messages. Calls that follow one another belong to one message of the assistant."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[Message] = []
    for number, item in enumerate(given):
        where = f"input.{number}"
        kind = item.get("type", "message")
        if kind == "message":
            messages.append(_message(item, where))
        elif kind == "function_call":
            _add_call(messages, item, where)
        elif kind == "function_call_output":
            output = item.get("output")
            content = output if isinstance(output, str) else _parts(output, f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": _text(item, "call_id", where), "content": content})
        elif kind != "reasoning":  # the model's own thoughts are not shown to it again
            raise InvalidParameter(
                f"{where}: items of type {str(kind)[:64]!r} are not supported; there are message, function_call, "
                "function_call_output and reasoning"
            )
    return messages


def _message(item: dict[str, Any], where: str) -> Message:
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidParameter(f"{where}.role: give one of {', '.join(_ROLES)}")
    content = item.get("content")
    return {
        "role": _ROLES[role],
        "content": content if isinstance(content, str) else _parts(content, f"{where}.content"),
    }


def _parts(content: Any, where: str) -> str | list[dict[str, Any]]:
    """Parts as chat has them; a lone text as a text."""
    if not isinstance(content, list) or len(content) > 1024:
        raise InvalidParameter(f"{where}: give a text, or a list of at most 1024 parts")
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in _TEXT_PARTS:
            parts.append({"type": "text", "text": _text(part, _TEXT_PARTS[kind], f"{where}.{number}")})
        elif kind == "input_image":
            parts.append({"type": "image_url", "image_url": {"url": part.get("image_url")}})
        else:
            raise InvalidParameter(f"{where}.{number}: a part of type {str(kind)[:64]!r} is not supported")
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _add_call(messages: list[Message], item: dict[str, Any], where: str) -> None:
    function = {"name": _text(item, "name", where), "arguments": _text(item, "arguments", where)}
    call = {"id": _text(item, "call_id", where), "type": "function", "function": function}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(call)


def _text(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise InvalidParameter(f"{where}.{name}: give a text")
    return value


def _with_instructions(instructions: str | None, said: list[Message]) -> list[Message]:
    """Instructions and the system messages at the start as one: templates take a single one, at the start."""
    texts = [] if instructions is None else [instructions]
    rest = list(said)
    while rest and rest[0]["role"] == "system" and isinstance(rest[0]["content"], str):
        texts.append(rest.pop(0)["content"])
    return [{"role": "system", "content": "\n\n".join(texts)}, *rest] if texts else rest


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise InvalidParameter(f"tools: type {str(tool.get('type'))[:64]!r} is not supported; there is function")
    names = ("name", "description", "parameters", "strict")
    return {
        "type": "function",
        "function": {name: tool[name] for name in names if tool.get(name) is not None},
    }


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools":
        tools = choice.get("tools")
        named = [_named(tool) for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": named}}
    return _named(choice)


def _named(choice: dict[str, Any]) -> dict[str, Any]:
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        raise InvalidParameter("tool_choice: give none, auto, required, or {'type': 'function', 'name': NAME}")
    return {"type": "function", "function": {"name": choice["name"]}}


def _response_format(text: TextOptions | None) -> dict[str, Any] | None:
    form = text.format if text is not None else None
    if not form or form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}
