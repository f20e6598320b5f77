"""What a parser of tool calls is made of: the tools of a request, the way of a call in JSON. It knows no model's markers."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmdeploy.serve.parsers.scanner import Scanner, Steps, ignore

# How a marker is spelled in a Lark grammar: a special token by its number, text in quotes.
Spell = Callable[[str], str]
MAX_FORCED_CALLS = 16


@dataclass(frozen=True)
class Tool:
    """A function that the model may call; parameters: a JSON schema."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def properties(self) -> Mapping[str, Any]:
        """The schemas of the parameters by name."""
        properties = self.parameters.get("properties")
        return properties if isinstance(properties, Mapping) else {}

    def parameter_type(self, name: str) -> str | None:
        """The JSON type of a parameter, None where the schema names none, or several."""
        schema = self.properties.get(name)
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        return kind if isinstance(kind, str) else None


def quoted(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text, ensure_ascii=False)


def argument_json(text: str, kind: str | None) -> str:
    """A parameter that a model wrote as plain text, as JSON: texts are quoted, anything else has to be JSON already."""
    if kind == "string":
        return json.dumps(text, ensure_ascii=False)
    try:
        return json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)


class ToolParser(Scanner):
    """A parser of one format of tool calls.

    id_length: characters of a call's id, where the model's template insists on a number.
    """

    id_length: int | None = None

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        self.tools = {tool.name: tool for tool in tools}
        super().__init__()

    @classmethod
    def call_rule(cls, tools: Sequence[Tool], spell: Spell, count: str) -> str:
        """Lark rules for `calls`, a call of one of these tools; count: a quantifier for further calls, empty for none."""
        raise NotImplementedError

    @classmethod
    def schemas(cls, index: int, tool: Tool) -> dict[str, Any]:
        """The JSON schemas that `call_rule` refers to for the tool of this number, by the names of their grammars."""
        return {f"args{index}": {"type": "object", **tool.parameters}}

    @classmethod
    def write_calls(cls, calls: Sequence[tuple[str, str]]) -> str:
        """Calls (name, arguments) as the model would have written them, for templates that cannot."""
        raise NotImplementedError

    def _call_object(self, *, known_only: bool = False) -> Generator[None, None, bool]:
        """A call `{"name": ..., "arguments": {...}}`, in any order of keys; False if it is none, and nothing was told.

        known_only: a name that is no tool's makes it none.
        """
        name: str | None = None
        held: str | None = None
        is_told = False
        if not (yield from self._accept("{")):
            return False
        while True:
            yield from self._space()
            if (yield from self._accept("}")):
                break
            key = yield from self._read_json()
            yield from self._space()
            if not isinstance(key, str) or not (yield from self._accept(":")):
                break
            yield from self._space()
            if key == "name" and name is None:
                value = yield from self._read_json()
                name = value if isinstance(value, str) and value and self._may_call(value, known_only) else None
                if name is None:
                    break
            elif key in ("arguments", "parameters") and not is_told and held is None:
                if name is not None:
                    self._tell_call(name)
                    is_told = True
                    yield from self._argument_value(self._arguments)
                else:
                    pieces: list[str] = []
                    yield from self._argument_value(pieces.append)
                    held = "".join(pieces)
            elif not (yield from self._json_value(ignore)):
                break
            yield from self._space()
            yield from self._accept(",")
        if name is None or (known_only and not is_told and held is None):
            return is_told
        if not is_told:
            self._tell_call(name)
            self._arguments(held or "{}")
        return True

    def _may_call(self, name: str, known_only: bool) -> bool:
        return name in self.tools or not known_only

    def _tell_call(self, name: str) -> None:
        """A call has been recognized: what was recorded is no text."""
        self._end_record()
        self._start_call(name)

    def _argument_value(self, emit: Callable[[str], None]) -> Steps:
        """The arguments' JSON; a string that holds them is unpacked."""
        while not self._buffer and not self._has_ended:
            yield
        if not self._buffer.startswith('"'):
            yield from self._json_value(emit)
            return
        value = yield from self._read_json()
        if isinstance(value, str):
            emit(value)


def json_call_rule(tools: Sequence[Tool], before: str, after: str, key: str, count: str, separator: str = "") -> str:
    """`calls` for formats of one JSON object per call, between two pieces of Lark."""
    names = [
        f"c{index}: {quoted(json.dumps({'name': tool.name}, ensure_ascii=False)[:-1] + f', {json.dumps(key)}: ')} "
        f'@args{index} "}}"'
        for index, tool in enumerate(tools)
    ]
    choice = " | ".join(f"c{index}" for index in range(len(tools)))
    more = f" ({separator} call){count}" if count else ""
    return "\n".join([f"calls: call{more}", f"call: {before} ({choice}) {after}", *names])
