"""The body of /v1/messages and its way into a chat's. It knows nothing of answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from lmdeploy.errors import InvalidParameter
from lmdeploy.serve.openai.pieces import chat_request
from lmdeploy.serve.openai.protocol import ChatRequest, Count, StopWord, Text

_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}

Block = dict[str, Any]
Blocks = Annotated[list[Block], Field(max_length=1024)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=(), allow_inf_nan=False)


class MessageParam(_Part):
    role: Literal["user", "assistant", "system"]
    content: Text | Blocks


class Tool(_Part):
    """A tool of the client's own; those that Anthropic runs have another type."""

    name: Annotated[StrictStr, Field(min_length=1, max_length=128)]
    type: Annotated[StrictStr, Field(max_length=64)] | None = None
    description: Text | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(_Part):
    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[StrictStr, Field(max_length=128)] | None = None
    disable_parallel_tool_use: StrictBool = False


class Thinking(_Part):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None


class CountRequest(_Part):
    """What /v1/messages/count_tokens counts: all that becomes part of the prompt."""

    model: Annotated[StrictStr, Field(max_length=4096)]
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=4096)]
    system: Text | Blocks | None = None
    tools: Annotated[list[Tool], Field(max_length=256)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None


class MessagesRequest(CountRequest):
    max_tokens: Count
    temperature: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=1 << 31)] | None = None
    stop_sequences: Annotated[list[StopWord], Field(max_length=64)] | None = None
    stream: StrictBool = False
    metadata: dict[str, Any] | None = Field(None, max_length=32)


def to_chat(body: CountRequest) -> ChatRequest:
    """The chat that this request is. Raises InvalidParameter."""
    messages = [] if body.system is None else [{"role": "system", "content": _content(body.system, "system")}]
    for number, message in enumerate(body.messages):
        messages += _messages(message, f"messages.{number}")
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "tools": [_tool(tool, f"tools.{number}") for number, tool in enumerate(body.tools)] if body.tools else None,
        "enable_thinking": None if body.thinking is None else body.thinking.type != "disabled",
    }
    if body.tools and body.tool_choice is not None:
        fields["tool_choice"] = _tool_choice(body.tool_choice)
        fields["parallel_tool_calls"] = False if body.tool_choice.disable_parallel_tool_use else None
    if isinstance(body, MessagesRequest):
        fields |= {name: getattr(body, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "stream")}
        # The stop text tells which one it was; what goes to the client is without it.
        fields |= {"stop": body.stop_sequences or None, "include_stop_str_in_output": bool(body.stop_sequences)}
    return chat_request(fields)


def _messages(message: MessageParam, where: str) -> list[dict[str, Any]]:
    """One message as chat's: results of tools become messages of their own, before the text beside them."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results, calls, rest = [], [], []
    for number, block in enumerate(message.content):
        place = f"{where}.content.{number}"
        kind = block.get("type")
        if kind == "tool_result":
            content = _content(block.get("content") or "", f"{place}.content")
            results.append({"role": "tool", "tool_call_id": _text(block, "tool_use_id", place), "content": content})
        elif kind == "tool_use":
            arguments = msgspec.json.encode(block.get("input") or {}).decode()
            function = {"name": _text(block, "name", place), "arguments": arguments}
            calls.append({"id": _text(block, "id", place), "type": "function", "function": function})
        elif kind not in ("thinking", "redacted_thinking"):  # the model's own thoughts are not shown to it again
            rest.append(_part(block, place))
    told: list[dict[str, Any]] = []
    if rest or calls or not results:
        told.append({"role": message.role, "content": _joined(rest), **({"tool_calls": calls} if calls else {})})
    return results + told


def _content(content: Any, where: str) -> str | list[Block]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or len(content) > 1024:
        raise InvalidParameter(f"{where}: give a text, or a list of at most 1024 blocks")
    return _joined([_part(block, f"{where}.{number}") for number, block in enumerate(content)])


def _joined(parts: list[Block]) -> str | list[Block]:
    """Blocks of text alone as one text, which every template takes."""
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _part(block: Any, where: str) -> Block:
    """A block of text or an image, as chat has them."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "text":
        return {"type": "text", "text": _text(block, "text", where)}
    source = block.get("source") if isinstance(block, dict) else None
    if kind == "image" and isinstance(source, dict):
        is_inline = source.get("type") == "base64"
        url = f"data:{source.get('media_type')};base64,{source.get('data')}" if is_inline else source.get("url")
        return {"type": "image_url", "image_url": {"url": url}}
    raise InvalidParameter(f"{where}: a block of type {str(kind)[:64]!r} is not supported here")


def _text(block: Block, name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise InvalidParameter(f"{where}.{name}: give a text")
    return value


def _tool(tool: Tool, where: str) -> dict[str, Any]:
    if tool.type not in (None, "custom") or tool.input_schema is None:
        raise InvalidParameter(f"{where}: {tool.name!r} has no input_schema, or is a tool that runs at Anthropic's")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    return {"type": "function", "function": function | ({"description": tool.description} if tool.description else {})}


def _tool_choice(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.type != "tool":
        return _TOOL_CHOICES[choice.type]
    if choice.name is None:
        raise InvalidParameter("tool_choice.name: name the tool")
    return {"type": "function", "function": {"name": choice.name}}
