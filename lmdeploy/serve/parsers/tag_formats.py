"""Tool calls whose arguments stand one by one between tags: Qwen3-Coder, GLM-4.5 and later, DeepSeek V3.2."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from lmdeploy.serve.parsers.scanner import Steps, ignore
from lmdeploy.serve.parsers.tools import Spell, Tool, ToolParser, argument_json, quoted


class _TagParser(ToolParser):
    """Arguments become JSON one by one, each once its tag is closed."""

    @classmethod
    def schemas(cls, index: int, tool: Tool) -> dict[str, Any]:
        return {
            f"args{index}_{number}": _with_definitions(schema, tool.parameters)
            for number, (name, schema) in enumerate(tool.properties.items())
            if tool.parameter_type(name) != "string"
        }

    def _begin_arguments(self, name: str) -> None:
        self._tell_call(name)
        self._tool = self.tools.get(name, Tool(name))
        self._count = 0

    def _argument(self, name: str, text: str, kind: str | None = None) -> None:
        value = argument_json(text, kind or self._tool.parameter_type(name))
        self._arguments(f"{', ' if self._count else '{'}{json.dumps(name, ensure_ascii=False)}: {value}")
        self._count += 1

    def _end_arguments(self) -> None:
        self._arguments("}" if self._count else "{}")


class Qwen3CoderParser(_TagParser):
    """`<tool_call><function=NAME><parameter=KEY>value</parameter></function></tool_call>`; the outer tag may be missing."""

    _OPENINGS = ("<tool_call>", "<function=")

    def _run(self) -> Steps:
        while marker := (yield from self._until(self._OPENINGS, self._content, drops_space=True)):
            self._begin_record(marker)
            if marker == "<tool_call>":
                yield from self._space()
                marker = yield from self._accept("<function=")
            if not marker or not (yield from self._call()):
                self._content(self._end_record())
                continue
            yield from self._space()
            yield from self._accept("</tool_call>")

    def _call(self) -> Generator[None, None, bool]:
        name, marker = yield from self._read_until(">", "\n")
        if marker != ">" or not name:
            return False
        self._begin_arguments(name)
        while True:
            yield from self._space()
            if not (yield from self._accept("<parameter=")):
                break
            key, _ = yield from self._read_until(">")
            value, end = yield from self._read_until("</parameter>")
            if end is None:  # the answer was cut off: half a value is no value
                return True
            self._argument(key, value.removeprefix("\n").removesuffix("\n"))
        yield from self._until(("</function>",), ignore)
        self._end_arguments()
        return True

    @classmethod
    def call_rule(cls, tools: Sequence[Tool], spell: Spell, count: str) -> str:
        lines = [f'call: {spell("<tool_call>")} "\\n" (%s) "</function>\\n" {spell("</tool_call>")}' % _choice(tools)]
        for index, tool in enumerate(tools):
            begin = f"<function={tool.name}>\n"
            lines += _parameter_rules(index, tool, begin, "<parameter={}>\n", "\n</parameter>\n")
        return "\n".join([_repeated(count, '"\\n"'), *lines])


class GlmParser(_TagParser):
    """`<tool_call>NAME<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`, with or without line breaks."""

    def _run(self) -> Steps:
        while marker := (yield from self._until(("<tool_call>",), self._content, drops_space=True)):
            self._begin_record(marker)
            if not (yield from self._call()):
                self._content(self._end_record())

    def _call(self) -> Generator[None, None, bool]:
        yield from self._space()
        name, marker = yield from self._read_until("\n", "<arg_key>", "</tool_call>")
        if marker is None or not name.strip():
            return False
        self._begin_arguments(name.strip())
        while marker != "</tool_call>":
            if marker != "<arg_key>":
                _, marker = yield from self._read_until("<arg_key>", "</tool_call>")
                if marker is None:
                    return True
                continue
            key, _ = yield from self._read_until("</arg_key>")
            yield from self._until(("<arg_value>",), ignore)
            value, end = yield from self._read_until("</arg_value>")
            if end is None:
                return True
            self._argument(key.strip(), value)
            marker = None
        self._end_arguments()
        return True

    @classmethod
    def call_rule(cls, tools: Sequence[Tool], spell: Spell, count: str) -> str:
        lines = [f"call: {spell('<tool_call>')} (%s) {spell('</tool_call>')}" % _choice(tools)]
        for index, tool in enumerate(tools):
            key = "<arg_key>{}</arg_key>\n<arg_value>"
            lines += _parameter_rules(index, tool, f"{tool.name}\n", key, "</arg_value>\n")
        return "\n".join([_repeated(count, '"\\n"'), *lines])


class DeepSeekV32Parser(_TagParser):
    """`<｜DSML｜invoke name="NAME"><｜DSML｜parameter name="KEY" string="true">value</｜DSML｜parameter></｜DSML｜invoke>`."""

    _CALLS, _CALLS_END = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
    _INVOKE, _INVOKE_END = '<｜DSML｜invoke name="', "</｜DSML｜invoke>"
    _PARAMETER, _PARAMETER_END = '<｜DSML｜parameter name="', "</｜DSML｜parameter>"

    def _run(self) -> Steps:
        emit = self._content
        while marker := (yield from self._until((self._CALLS, self._CALLS_END, self._INVOKE), emit, drops_space=True)):
            if marker == self._INVOKE:
                self._begin_record(marker)
                if not (yield from self._call()):
                    emit(self._end_record())

    def _call(self) -> Generator[None, None, bool]:
        name, marker = yield from self._read_until('"', "\n")
        if marker != '"' or not name:
            return False
        self._begin_arguments(name)
        while True:
            marker = yield from self._until((self._PARAMETER, self._INVOKE_END), ignore)
            if marker is None:
                return True
            if marker == self._INVOKE_END:
                break
            key, _ = yield from self._read_until('"')
            attributes, _ = yield from self._read_until(">")
            value, end = yield from self._read_until(self._PARAMETER_END)
            if end is None:
                return True
            self._argument(key, value, "string" if 'string="true"' in attributes else "json")
        self._end_arguments()
        return True

    @classmethod
    def call_rule(cls, tools: Sequence[Tool], spell: Spell, count: str) -> str:
        call = f"call: ({_choice(tools)}) {quoted(cls._INVOKE_END)}"
        lines = [f'calls: {quoted(cls._CALLS)} "\\n" list "\\n" {quoted(cls._CALLS_END)}', call]
        for index, tool in enumerate(tools):
            begin = f'{cls._INVOKE}{tool.name}">\n'
            lines += _parameter_rules(
                index, tool, begin, cls._PARAMETER + '{}" string="{is_text}">', cls._PARAMETER_END + "\n"
            )
        return "\n".join([_repeated(count, '"\\n"').replace("calls:", "list:", 1), *lines])


def _choice(tools: Sequence[Tool]) -> str:
    return " | ".join(f"c{index}" for index in range(len(tools)))


def _repeated(count: str, separator: str) -> str:
    return f"calls: call ({separator} call){count}" if count else "calls: call"


def _parameter_rules(index: int, tool: Tool, begin: str, key: str, end: str) -> list[str]:
    """`c{index}`: the required parameters, and the others if the model likes, in the order of the schema.

    key: what stands before a value, {} for its name; end: what stands after it.
    """
    required = set(tool.parameters.get("required") or ())
    names, rules = [], []
    for number, (name, schema) in enumerate(tool.properties.items()):
        rule = f"p{index}_{number}"
        is_text = tool.parameter_type(name) == "string"
        before = quoted(key.format(name, is_text=str(is_text).lower()) if "is_text" in key else key.format(name))
        names.append(rule if name in required else f"{rule}?")
        if is_text and "enum" not in schema:
            rules += [f"{rule}: {before} {rule}_v", f"{rule}_v[lazy]: {_text_until(end)}"]
        elif is_text:
            values = " | ".join(quoted(value) for value in schema["enum"] if isinstance(value, str))
            rules.append(f"{rule}: {before} ({values}) {quoted(end)}")
        else:
            rules.append(f"{rule}: {before} @args{index}_{number} {quoted(end)}")
    return [f"c{index}: {quoted(begin)} {' '.join(names)}", *rules]


def _text_until(end: str) -> str:
    """A lazy lexeme: any text, up to and with its end."""
    escaped = "".join(rf"\x{{{ord(char):x}}}" for char in end)
    return f"/(?s:.*){escaped}/"


def _with_definitions(schema: Any, parameters: Mapping[str, Any]) -> Any:
    definitions = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    return {**definitions, **schema} if isinstance(schema, Mapping) and definitions else schema
