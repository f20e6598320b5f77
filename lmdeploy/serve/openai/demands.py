"""What a chat request asks of the answer's form: tools that it may or must call, a schema that it has to fit.

It knows neither the model's formats nor the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmdeploy.errors import InvalidParameter
from lmdeploy.serve.openai.protocol import ChatRequest
from lmdeploy.serve.openai.tool_protocol import AllowedToolsChoice, Function, FunctionReference, NamedTool, ToolChoice
from lmdeploy.serve.parsers.formats import Demand
from lmdeploy.serve.parsers.tools import Tool


def demand_of(body: ChatRequest) -> Demand:
    """Raises InvalidParameter for a choice among tools that are not there."""
    choice = _choice(body)
    functions = [] if choice == "none" else _functions(body)
    form = None if body.response_format is None else body.response_format.form()
    is_named = isinstance(choice, NamedTool)
    if isinstance(choice, NamedTool):
        functions = _chosen(functions, [choice])
    elif isinstance(choice, AllowedToolsChoice):
        functions = _chosen(functions, choice.allowed_tools.tools)
        choice = choice.allowed_tools.mode
    forces = is_named or choice == "required"
    if forces and not functions:
        raise InvalidParameter(f"tool_choice {'names a tool' if is_named else 'is required'}, and there are no tools")
    tools = [Tool(function.name, function.parameters or {}) for function in functions]
    return Demand(tools, forces, body.parallel_tool_calls is not False and not is_named and not body.functions, form)


def tool_dicts(body: ChatRequest) -> list[dict[str, Any]] | None:
    """The tools as a chat template takes them; None without any."""
    functions = [] if _choice(body) == "none" else _functions(body)
    return [{"type": "function", "function": one.model_dump(exclude_none=True)} for one in functions] or None


def modern_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the older `function_call` and role `function` in today's form."""
    return [_modern(message) for message in messages]


def _modern(message: dict[str, Any]) -> dict[str, Any]:
    call = message.get("function_call")
    if message.get("role") == "function":
        return {**message, "role": "tool"}
    if not isinstance(call, Mapping):
        return message
    rest = {name: value for name, value in message.items() if name != "function_call"}
    return {**rest, "tool_calls": [{"type": "function", "function": dict(call)}]}


def _choice(body: ChatRequest) -> ToolChoice:
    if body.functions and body.function_call is not None:
        call = body.function_call
        return NamedTool(function=call) if isinstance(call, FunctionReference) else call
    return body.tool_choice if body.tool_choice is not None else "auto"


def _functions(body: ChatRequest) -> list[Function]:
    if body.tools and body.functions:
        raise InvalidParameter("functions is the older form of tools: give one of them")
    functions = body.functions or [item.function for item in body.tools or []]
    names = [function.name for function in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidParameter(f"two tools are called {twice!r}: give each its own name")
    return functions


def _chosen(functions: Sequence[Function], wanted: Sequence[NamedTool]) -> list[Function]:
    names = [tool.function.name for tool in wanted]
    known = {function.name: function for function in functions}
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        raise InvalidParameter(f"tool_choice names {missing!r}, which is none of the tools {list(known)}")
    return [known[name] for name in dict.fromkeys(names)]
