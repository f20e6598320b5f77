"""Answers in every format, and what has to be found in them: (content, reasoning, calls)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lmdeploy.serve.parsers import TOOL_PARSERS
from lmdeploy.serve.parsers.events import CallArguments, CallStart, Chain, Content, Event, Parser, Reasoning
from lmdeploy.serve.parsers.reasoning import ThinkParser
from lmdeploy.serve.parsers.special import Cleaned, SpecialTokens
from lmdeploy.serve.parsers.tools import Tool

Found = tuple[str, str, list[tuple[str, str]]]

TOOLS = (
    Tool(
        "get", {"type": "object", "properties": {"a": {"type": "string"}, "n": {"type": "integer"}}, "required": ["a"]}
    ),
    Tool("other"),
)
SPECIAL = SpecialTokens(["<|im_end|>", "<|im_start|>", "<s>", "[PAD]"])


def tool_parser(name: str) -> Callable[[], Parser]:
    return lambda: TOOL_PARSERS[name](TOOLS)


def thinking(begins_inside: bool, name: str | None = None) -> Callable[[], Parser]:
    """Thoughts, then calls, special tokens taken out: the way of an answer in the server."""

    def make() -> Parser:
        stages: list[Parser] = [ThinkParser(begins_inside)]
        if name is not None:
            stages.append(TOOL_PARSERS[name](TOOLS))
        return Cleaned(Chain(stages), SPECIAL)

    return make


def read(parser: Parser, pieces: Iterable[str]) -> list[Event]:
    """All events of a text in pieces."""
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events + parser.finish()


def found(events: Sequence[Event]) -> Found:
    content = reasoning = ""
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, Reasoning):
            reasoning += event.text
        elif isinstance(event, CallStart):
            calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return content, reasoning, calls


ANSWERS: list[tuple[str, Callable[[], Parser], str, Found]] = [
    ("qwen: two calls, the second with its name last", tool_parser("qwen"),
     'Let me see.\n<tool_call>\n{"name": "get", "arguments": {"a": "x}]y\\"\\\\", "n": 1}}\n</tool_call>\n'
     '<tool_call>\n{"arguments": {"n": [2, {}]}, "name": "other"}\n</tool_call>\n',
     ("Let me see.", "", [("get", '{"a": "x}]y\\"\\\\", "n": 1}'), ("other", '{"n": [2, {}]}')])),
    ("qwen: no arguments, then text", tool_parser("qwen"),
     '<tool_call>{"name": "other"}</tool_call> done', (" done", "", [("other", "{}")])),
    ("qwen: not a call", tool_parser("qwen"), "a <tool_call> b <tool", ("a<tool_call> b <tool", "", [])),
    ("qwen: arguments as a text", tool_parser("qwen"),
     '<tool_call>{"name": "get", "arguments": "{\\"a\\": \\"\\u00e9\\"}"}</tool_call>', ("", "", [("get", '{"a": "é"}')])),
    ("qwen: cut off", tool_parser("qwen"), '<tool_call>\n{"name": "get", "arguments": {"a": "half',
     ("", "", [("get", '{"a": "half')])),
    ("qwen3coder", tool_parser("qwen3coder"),
     "ok\n<tool_call>\n<function=get>\n<parameter=a>\n12\n34\n</parameter>\n<parameter=n>\n5\n</parameter>\n</function>\n"
     "</tool_call>\n<tool_call>\n<function=other>\n</function>\n</tool_call>",
     ("ok", "", [("get", '{"a": "12\\n34", "n": 5}'), ("other", "{}")])),
    ("qwen3coder: without the outer tag", tool_parser("qwen3coder"),
     "<function=get><parameter=a>é</parameter></function>", ("", "", [("get", '{"a": "é"}')])),
    ("internlm2", tool_parser("internlm2"),
     'Sure<|action_start|><|plugin|>\n{"name": "get", "parameters": {"a": "b"}}<|action_end|>\n',
     ("Sure", "", [("get", '{"a": "b"}')])),
    ("intern-s1: spaces between the markers", tool_parser("intern-s1"),
     '<|action_start|> <|plugin|>\n{"name": "get", "parameters": {}}\n<|action_end|>', ("", "", [("get", "{}")])),
    ("internlm2: the interpreter is text", tool_parser("internlm2"),
     "<|action_start|><|interpreter|>1+1<|action_end|>", ("<|action_start|><|interpreter|>1+1<|action_end|>", "", [])),
    ("llama3: bare", tool_parser("llama3"),
     '{"name": "get", "parameters": {"a": "b"}}; {"name": "other", "parameters": {}}',
     ("", "", [("get", '{"a": "b"}'), ("other", "{}")])),
    ("llama3: JSON that is no call", tool_parser("llama3"), '{"name": "Ann", "parameters": 1} x',
     ('{"name": "Ann", "parameters": 1} x', "", [])),
    ("llama3: after a tag", tool_parser("llama3"), '<|python_tag|>{"name": "get", "parameters": {"a": "b"}}',
     ("", "", [("get", '{"a": "b"}')])),
    ("llama3: function tag", tool_parser("llama3"), 'so <function=get>{"a": "b"}</function> there',
     ("so there", "", [("get", '{"a": "b"}')])),
    ("mistral: a list", tool_parser("mistral"),
     'hm[TOOL_CALLS][{"name": "get", "arguments": {"a": "b"}}, {"name": "other", "arguments": {}}]',
     ("hm", "", [("get", '{"a": "b"}'), ("other", "{}")])),
    ("mistral: names", tool_parser("mistral"), '[TOOL_CALLS]get{"a": "["}[TOOL_CALLS]other[CALL_ID]abc[ARGS]{"n": 2}',
     ("", "", [("get", '{"a": "["}'), ("other", '{"n": 2}')])),
    ("deepseek: V3 and V3.1", tool_parser("deepseek"),
     't<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n{"a": "`"}\n```<｜tool▁call▁end｜>\n'
     '<｜tool▁call▁begin｜>other<｜tool▁sep｜>{"n": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
     ("t", "", [("get", '{"a": "`"}'), ("other", '{"n": 2}')])),
    ("deepseek-v32", tool_parser("deepseek-v32"),
     'q<｜DSML｜function_calls>\n<｜DSML｜invoke name="get">\n<｜DSML｜parameter name="a" string="true">1</｜DSML｜parameter>\n'
     '<｜DSML｜parameter name="n" string="false">[1]</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
     ("q", "", [("get", '{"a": "1", "n": [1]}')])),
    ("glm: 4.5", tool_parser("glm"),
     "<tool_call>get\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>n</arg_key>\n<arg_value>2</arg_value>\n"
     "</tool_call>\n", ("", "", [("get", '{"a": "1", "n": 2}')])),
    ("glm: 4.7", tool_parser("glm47"),
     "<tool_call>get<arg_key>n</arg_key><arg_value>2</arg_value></tool_call><tool_call>other</tool_call>",
     ("", "", [("get", '{"n": 2}'), ("other", "{}")])),
    ("gpt-oss: a call", tool_parser("gpt-oss"),
     "<|channel|>analysis<|message|>hm, so<|end|><|start|>assistant<|channel|>commentary to=functions.get "
     '<|constrain|>json<|message|>{"a": "b"}', ("", "hm, so", [("get", '{"a": "b"}')])),
    ("gpt-oss: recipient in the role", tool_parser("gpt-oss"),
     '<|start|>assistant to=functions.get<|channel|>commentary json<|message|>{"a": 1}<|call|>',
     ("", "", [("get", '{"a": 1}')])),
    ("gpt-oss: final", tool_parser("gpt-oss"),
     "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yo <b>\n", ("yo <b>\n", "hm", [])),
    ("thinking", thinking(False), "<think>\nso <|im_end|>it is\n</think>\n\nYes <s>or </think> no",
     ("Yes or </think> no", "so it is", [])),
    ("thinking: none", thinking(False), " Yes <think> x </think>", (" Yes <think> x </think>", "", [])),
    ("thinking: the prompt has opened it", thinking(True), "so\n\n it is </think>Yes[PAD]", ("Yes", "so\n\n it is", [])),
    ("thinking: opened twice", thinking(True), "<think>so</think>Yes", ("Yes", "so", [])),
    ("thinking: cut off", thinking(True), "so it is </thi", ("", "so it is </thi", [])),
    ("thinking, then a call", thinking(False, "qwen"),
     '<think>a <tool_call> b</think>\n\nok\n<tool_call>\n{"name": "get", "arguments": {"a": "<|im_end|>"}}\n</tool_call>',
     ("ok", "a <tool_call> b", [("get", '{"a": "<|im_end|>"}')])),
]  # fmt: skip
