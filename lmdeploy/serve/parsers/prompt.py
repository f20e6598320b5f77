"""Messages with tools for chat templates that have no form for them. It renders nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lmdeploy.errors import InvalidParameter
from lmdeploy.serve.parsers.tools import ToolParser

_SYSTEM = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

Messages = Sequence[Mapping[str, Any]]


def speaks_of_tools(messages: Messages) -> bool:
    """Whether a call of a tool, or its result, is among the messages."""
    return any(message.get("role") == "tool" or message.get("tool_calls") for message in messages)


def calls_as_text(messages: Messages, parser: type[ToolParser]) -> list[Mapping[str, Any]]:
    """The assistant's calls written into its text, as the model itself writes them."""
    return [_call_as_text(message, parser) if message.get("tool_calls") else message for message in messages]


def tools_as_text(messages: Messages, tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The tools in a system message, and their results as messages of the user."""
    told = [_result_as_text(message) if message.get("role") == "tool" else dict(message) for message in messages]
    if not tools:
        return told
    system = _SYSTEM.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if told and told[0].get("role") in ("system", "developer") and isinstance(told[0].get("content"), str):
        return [{**told[0], "content": f"{told[0]['content']}\n\n{system}"}, *told[1:]]
    return [{"role": "system", "content": system}, *told]


def _call_as_text(message: Mapping[str, Any], parser: type[ToolParser]) -> dict[str, Any]:
    calls = []
    for call in message["tool_calls"] if isinstance(message["tool_calls"], list) else [None]:
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str):
            raise InvalidParameter("messages: each of tool_calls needs a function with name and arguments")
        arguments = function.get("arguments", "{}")
        calls.append((name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)))
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    content = rest.get("content")
    text = parser.write_calls(calls)
    return {**rest, "content": f"{content}\n{text}" if isinstance(content, str) and content else text}


def _result_as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return {"role": "user", "content": f"<tool_response>\n{text}\n</tool_response>"}
