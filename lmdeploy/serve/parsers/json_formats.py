"""Tool calls that are JSON objects between a model's own markers: Hermes and Qwen, InternLM2, Llama 3, Mistral, DeepSeek."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence

from lmdeploy.serve.parsers.scanner import Steps, ignore
from lmdeploy.serve.parsers.tools import Spell, Tool, ToolParser, json_call_rule, quoted


class _BlockParser(ToolParser):
    """`OPENING {call} CLOSING`, any number of times, with text before, between and after."""

    OPENING = ""
    CLOSING = ""

    def _run(self) -> Steps:
        emit = self._content
        while (yield from self._until((self.OPENING,), emit, drops_space=True)):
            self._begin_record(self.OPENING)
            yield from self._space()
            is_call = yield from self._block()
            if not is_call:
                emit(self._end_record())
                continue
            yield from self._until((self.CLOSING,), ignore)

    def _block(self) -> Generator[None, None, bool]:
        return (yield from self._call_object())


class HermesParser(_BlockParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen2.5, Qwen3."""

    OPENING, CLOSING = "<tool_call>", "</tool_call>"

    @classmethod
    def call_rule(cls, tools: Sequence[Tool], spell: Spell, count: str) -> str:
        before, after = f'{spell(cls.OPENING)} "\\n"', f'"\\n" {spell(cls.CLOSING)}'
        return json_call_rule(tools, before, after, "arguments", count, '"\\n"')

    @classmethod
    def write_calls(cls, calls: Sequence[tuple[str, str]]) -> str:
        return "\n".join(
            f'{cls.OPENING}\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}\n{cls.CLOSING}'
            for name, arguments in calls
        )


class InternLM2Parser(_BlockParser):
    """`<|action_start|><|plugin|>{"name": ..., "parameters": {...}}<|action_end|>`: InternLM2 and later, Intern-S1."""

    OPENING, CLOSING = "<|action_start|>", "<|action_end|>"

    def _block(self) -> Generator[None, None, bool]:
        if not (yield from self._accept("<|plugin|>")):
            return False
        yield from self._space()
        return (yield from self._call_object())

    @classmethod
    def call_rule(cls, tools: Sequence[Tool], spell: Spell, count: str) -> str:
        before = f'{spell(cls.OPENING)} {spell("<|plugin|>")} "\\n"'
        return json_call_rule(tools, before, f'"\\n"? {spell(cls.CLOSING)}', "parameters", count)

    @classmethod
    def write_calls(cls, calls: Sequence[tuple[str, str]]) -> str:
        return "".join(
            f'{cls.OPENING}<|plugin|>\n{{"name": {json.dumps(name, ensure_ascii=False)}, "parameters": {arguments}}}'
            f"{cls.CLOSING}\n"
            for name, arguments in calls
        )


class Llama3Parser(ToolParser):
    """A bare `{"name": ..., "parameters": {...}}`, or several with `;` between, at the start or after `<|python_tag|>`;
    and `<function=NAME>{...}</function>` anywhere. A bare object has to name a tool of the request."""

    _TAG = "<|python_tag|>"
    _FUNCTION = "<function="

    def _run(self) -> Steps:
        self._begin_record("")
        yield from self._space()
        if not (yield from self._bare_calls()):
            self._content(self._end_record())
        while marker := (yield from self._until((self._TAG, self._FUNCTION), self._content, drops_space=True)):
            self._begin_record(marker)
            is_call = yield from (self._tagged() if marker == self._TAG else self._function())
            if not is_call:
                self._content(self._end_record())

    def _tagged(self) -> Generator[None, None, bool]:
        yield from self._space()
        return (yield from self._bare_calls())

    def _bare_calls(self) -> Generator[None, None, bool]:
        if not (yield from self._call_object(known_only=True)):
            return False
        is_call = True
        while is_call:
            yield from self._space()
            self._begin_record("")
            yield from self._accept(";", ",")
            yield from self._space()
            is_call = yield from self._call_object(known_only=True)
        self._content(self._end_record())
        return True

    def _function(self) -> Generator[None, None, bool]:
        name, marker = yield from self._read_until(">")
        if marker is None or not name:
            return False
        yield from self._space()
        self._tell_call(name)
        yield from self._json_value(self._arguments)
        yield from self._until(("</function>",), ignore)
        return True

    @classmethod
    def call_rule(cls, tools: Sequence[Tool], spell: Spell, count: str) -> str:
        return json_call_rule(tools, "", "", "parameters", count, '"; "')


class MistralParser(ToolParser):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, and the later `[TOOL_CALLS]NAME[ARGS]{...}`."""

    id_length = 9
    _OPENING = "[TOOL_CALLS]"

    def _run(self) -> Steps:
        while (yield from self._until((self._OPENING,), self._content, drops_space=True)):
            self._begin_record(self._OPENING)
            yield from self._space()
            is_list = yield from self._accept("[")
            is_call = yield from (self._list() if is_list else self._named())
            if not is_call:
                self._content(self._end_record())

    def _list(self) -> Generator[None, None, bool]:
        count = 0
        while True:
            yield from self._space()
            if not (yield from self._call_object()):
                break
            count += 1
            yield from self._space()
            if not (yield from self._accept(",")):
                break
        yield from self._space()
        yield from self._accept("]")
        return count > 0

    def _named(self) -> Generator[None, None, bool]:
        name, marker = yield from self._read_until("[CALL_ID]", "[ARGS]", "{", "\n")
        if marker == "[CALL_ID]":
            _, marker = yield from self._read_until("[ARGS]", "{", "\n")
        name = name.strip()
        if marker not in ("[ARGS]", "{") or not name:
            return False
        if marker == "{":
            self._buffer = "{" + self._buffer
        self._tell_call(name)
        yield from self._space()
        yield from self._json_value(self._arguments)
        return True

    @classmethod
    def call_rule(cls, tools: Sequence[Tool], spell: Spell, count: str) -> str:
        rules = json_call_rule(tools, "", "", "arguments", count, '", "')
        return rules.replace("calls: ", "list: ", 1) + f'\ncalls: {spell(cls._OPENING)} "[" list "]"'


class DeepSeekParser(ToolParser):
    """DeepSeek V3, R1 (`function<｜tool▁sep｜>NAME`, arguments in a code fence) and V3.1 (`NAME<｜tool▁sep｜>{...}`)."""

    _CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    _CALL, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    _SEPARATOR = "<｜tool▁sep｜>"

    def _run(self) -> Steps:
        emit = self._content
        while marker := (yield from self._until((self._CALLS, self._CALLS_END, self._CALL), emit, drops_space=True)):
            if marker == self._CALL:
                self._begin_record(marker)
                if not (yield from self._call()):
                    emit(self._end_record())

    def _call(self) -> Generator[None, None, bool]:
        name, marker = yield from self._read_until(self._SEPARATOR, self._CALL_END)
        if marker != self._SEPARATOR or not name.strip():
            return False
        if name.strip() == "function":
            name, marker = yield from self._read_until("\n", "{", self._CALL_END)
            if marker == self._CALL_END or not name.strip():
                return False
            if marker == "{":
                self._buffer = "{" + self._buffer
        self._tell_call(name.strip())
        yield from self._space()
        yield from self._accept("```json", "```")
        yield from self._space()
        yield from self._json_value(self._arguments)
        yield from self._until((self._CALL_END,), ignore)
        return True

    @classmethod
    def call_rule(cls, tools: Sequence[Tool], spell: Spell, count: str) -> str:
        rules = [
            f"c{index}: {spell(cls._CALL)} {quoted(tool.name)} {spell(cls._SEPARATOR)} @args{index} {spell(cls._CALL_END)}"
            for index, tool in enumerate(tools)
        ]
        choice = " | ".join(f"c{index}" for index in range(len(tools)))
        more = f" call{count}" if count else ""
        body = f"calls: {spell(cls._CALLS)} call{more} {spell(cls._CALLS_END)}"
        return "\n".join([body, f"call: {choice}", *rules])
