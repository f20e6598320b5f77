"""Every format: what is found in an answer, and that it does not depend on how the answer came in pieces."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.serve.parsers import TOOL_PARSERS, guess_reasoning_parser, guess_tool_parser
from lmdeploy.serve.parsers.events import Parser
from lmdeploy.serve.parsers.special import Cleaned
from tests.serve.parsers.answers import ANSWERS, SPECIAL, TOOLS, Found, found, read, thinking, tool_parser

_IDS = [answer[0] for answer in ANSWERS]
_FRAGMENTS = [
    "<tool_call>", "</tool_call>", "\n", " ", '{"name": "get", "arguments": ', '{"name": "get", "parameters": ', '{"a": 1}',
    "}",
    "{", "[", "]", '"', "\\", ",", ":", "get", "function", "<function=", ">", "<parameter=", "</parameter>", "</function>",
    "<|action_start|>", "<|plugin|>", "<|action_end|>", "<|python_tag|>", ";", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "```json\n", "```", "<arg_key>",
    "</arg_key>", "<arg_value>", "</arg_value>", "<｜DSML｜invoke name=\"", "<｜DSML｜parameter name=\"",
    "</｜DSML｜parameter>", "</｜DSML｜invoke>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>", "analysis", "final",
    "commentary to=functions.get",
    "<think>", "</think>", "<|im_end|>", "<s>", "é", "<", "1",
]  # fmt: skip
_PARSERS = {
    **{name: tool_parser(name) for name in TOOL_PARSERS},
    "think": thinking(False),
    "think open": thinking(True, "qwen"),
}


@pytest.mark.parametrize(("make", "text", "expected"), [answer[1:] for answer in ANSWERS], ids=_IDS)
def test_what_is_found(make: Callable[[], Parser], text: str, expected: Found) -> None:
    assert found(read(make(), [text])) == expected


@pytest.mark.parametrize(("make", "text", "expected"), [answer[1:] for answer in ANSWERS], ids=_IDS)
def test_every_split_gives_the_same(make: Callable[[], Parser], text: str, expected: Found) -> None:
    for cut in range(len(text) + 1):
        assert found(read(make(), [text[:cut], text[cut:]])) == expected, cut
    assert found(read(make(), text)) == expected
    assert found(read(make(), [text, ""])) == expected


@pytest.mark.parametrize("name", _PARSERS)
@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.sampled_from(_FRAGMENTS), max_size=14), data=st.data())
def test_no_text_depends_on_its_pieces(name: str, pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = found(read(Cleaned(_PARSERS[name](), SPECIAL), [text]))
    assert found(read(Cleaned(_PARSERS[name](), SPECIAL), parts)) == whole
    assert found(read(Cleaned(_PARSERS[name](), SPECIAL), text)) == whole


@pytest.mark.parametrize("name", TOOL_PARSERS)
@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet="ab \n,.!?é", max_size=40))
def test_plain_text_is_content(name: str, text: str) -> None:
    assert found(read(tool_parser(name)(), [text])) == (text, "", [])


@pytest.mark.parametrize("name", ["qwen", "internlm2"])
def test_calls_that_are_written_are_read_again(name: str) -> None:
    calls = [("get", json.dumps({"a": 'é"\n'})), ("other", "{}")]
    text = TOOL_PARSERS[name].write_calls(calls)
    assert found(read(TOOL_PARSERS[name](TOOLS), [text])) == ("", "", calls)


@pytest.mark.parametrize("name", _PARSERS)
def test_a_long_answer_takes_linear_time(name: str) -> None:
    text = '<tool_call>{"name": "get", "arguments": {"a": "' + 'x<"\\' * 4000 + "[TOOL_CALLS]" * 200 + "<" * 4000
    started = time.process_time()
    read(_PARSERS[name](), [text[i : i + 4] for i in range(0, len(text), 4)])
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("signs", "tools", "reasoning"),
    [
        ("{%- for tool in tools %}<tool_call>{% endfor %}</think>", "qwen", "default"),
        ("<tool_call><function=x>", "qwen3coder", None),
        ("<tool_call>{{name}}<arg_key></think>", "glm", "default"),
        ("[TOOL_CALLS]", "mistral", None),
        ("<|channel|>analysis", "gpt-oss", "gpt-oss"),
        ("<|im_start|>\n<|plugin|>", "internlm2", None),
        ("<|python_tag|>", "llama3", None),
        ("<｜tool▁calls▁begin｜></think>", "deepseek", "default"),
        ("<|im_start|>", None, None),
    ],
)
def test_a_template_tells_its_formats(signs: str, tools: str | None, reasoning: str | None) -> None:
    assert guess_tool_parser(signs) == tools
    assert guess_reasoning_parser(signs) == reasoning
