"""Models' own Jinja: rendered as transformers renders it, with typed errors for what templates refuse."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import transformers

from lmdeploy.chat_template import ChatTemplate
from lmdeploy.chat_template.jinja import JinjaTemplate
from lmdeploy.errors import CheckpointError, InvalidParameter
from lmdeploy.tokenizer import Tokenizer
from tests.tokenizer.tiny_vocabularies import train_byte_level, write_json

CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}"
)

# Each uses constructs that released templates use.
SOURCES = {
    "chatml": CHATML,
    "trimmed blocks": (
        "{{ bos_token }}\n  {% for m in messages %}\n  <{{ m['role'] }}>\n{{ m['content'] | trim }}\n  {% endfor %}\n"
    ),
    "loop controls": "{% for m in messages %}{% if loop.index0 > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "namespace and reversal": (
        "{%- set ns = namespace(last=messages|length - 1, found=false) -%}"
        "{%- for m in messages[::-1] -%}{%- if not ns.found and m.role == 'user' -%}"
        "{%- set ns.found = true -%}{%- set ns.last = (messages|length - 1) - loop.index0 -%}{%- endif -%}{%- endfor -%}"
        "{{ ns.last }}{{ messages[ns.last]['content'].split('</think>')[-1].lstrip('\\n') }}"
    ),
    "thinking": (
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{{ messages[0].content }}"
    ),
    "tools as json": (
        "{%- if tools %}{{- '# Tools\\n' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}"
        "{{ tools | tojson(indent=4) }}{%- endif %}{%- for m in messages %}{%- if m.tool_calls %}"
        "{%- for call in m.tool_calls %}{{ call.function.name }}({{ call.function.arguments | tojson }})"
        "{% for key, value in call.function.arguments.items() %}{{ key ~ '=' ~ value }}{% endfor %}{%- endfor %}"
        "{%- else %}{{ m.content }}{%- endif %}{%- endfor %}"
    ),
    "macros and tests": (
        "{%- macro show(value, depth=0) -%}{%- if value is mapping -%}{%- for k, v in value|dictsort -%}"
        "{{ '  ' * depth }}{{ k }}:{{ show(v, depth + 1) }};{%- endfor -%}{%- elif value is string -%}{{ value|upper }}"
        "{%- elif value is iterable -%}[{{ value|map('string')|join(', ') }}]{%- else -%}{{ value }}{%- endif -%}"
        "{%- endmacro -%}{{ show({'b': 1, 'a': ['x', 2], 'c': {'d': messages[0].content}}) }}"
    ),
    "slices and filters": (
        "{%- set system = messages|selectattr('role', 'equalto', 'system')|map(attribute='content')|join('+') -%}"
        "{{ system }}|{{ (messages|rejectattr('role', 'equalto', 'system')|list)|length }}|{{ '%s-%d' % ('a', 3) }}"
        "|{{ 'x{}'.format(1) }}|{{ messages[-1].content.replace('q', 'Q') }}|{{ [1, 2] + [3] }}|{{ 7 // 2 }}|{{ none }}"
    ),
    "block assignment": "{% set body %}{{ messages[0].content }}{{ eos_token }}{% endset %}[{{ body }}]",
    "training mark": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "undefined is empty": "[{{ no_such_thing }}][{{ messages[0].missing }}]",
}
MESSAGES: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": " <b>'q' & \"é\"</b> "}],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "<think>t</think>\na1"},
        {"role": "user", "content": "q2"},
    ],
    [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": "é<"}}}],
        },
    ],
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "enum": ["<", "é"]}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_byte_level(special=["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>"]).save(
        str(path / "tokenizer.json")
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    write_json(
        path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **tokens}
    )
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )


def template_of(source: str, tokenizer: Tokenizer, **options: Any) -> JinjaTemplate:
    return JinjaTemplate({"default": source}, tokenizer, **options)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("messages", MESSAGES, ids=["one turn", "dialogue", "tool call"])
def test_renders_as_transformers_does(
    name: str, messages: list[dict[str, Any]], tokenizer: Tokenizer, reference: Any
) -> None:
    template = template_of(SOURCES[name], tokenizer)
    for tools in (None, TOOLS):
        for thinking in ({}, {"enable_thinking": False}):
            expected = reference.apply_chat_template(
                messages,
                chat_template=SOURCES[name],
                tools=tools,
                tokenize=False,
                add_generation_prompt=True,
                **thinking,
            )
            assert template.render(messages, tools=tools, **thinking) == expected


def test_ids_get_no_begin_token_beside_the_templates_own(tokenizer: Tokenizer) -> None:
    template = template_of(CHATML, tokenizer)
    ids = template.render_ids(MESSAGES[0], tokenizer)
    assert ids == tokenizer.encode(template.render(MESSAGES[0]), add_special_tokens=False)
    assert ids[0] == tokenizer.special_tokens["<|im_start|>"]
    plain = template_of(CHATML, tokenizer, capability="completion")
    assert plain.render_ids(MESSAGES[0], tokenizer)[0] == tokenizer.bos_token_id


def test_arguments_of_tool_calls_may_be_json_text(tokenizer: Tokenizer) -> None:
    template = template_of(SOURCES["tools as json"], tokenizer)
    as_text = [
        MESSAGES[2][0],
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": "é<"}'}}]},
    ]
    assert template.render(as_text) == template.render(MESSAGES[2])
    broken = [MESSAGES[2][0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    with pytest.raises(InvalidParameter, match="refuses these messages"):
        template.render(broken)


def test_tool_use_template_is_taken_with_tools(tokenizer: Tokenizer) -> None:
    template = JinjaTemplate({"default": "plain", "tool_use": "tools"}, tokenizer)
    assert template.render(MESSAGES[0]) == "plain"
    assert template.render(MESSAGES[0], tools=TOOLS) == "tools"


def test_default_system_text(tokenizer: Tokenizer) -> None:
    template = template_of(CHATML, tokenizer, default_system="be brief")
    assert template.render(MESSAGES[0]).startswith("<|im_start|>system\nbe brief<|im_end|>\n")
    assert "be brief" not in template.render(MESSAGES[1])


def test_get_prompt_and_continuation(tokenizer: Tokenizer) -> None:
    template: ChatTemplate = template_of(CHATML, tokenizer)
    assert template.get_prompt("q") == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    after = "<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert template.get_prompt("q", sequence_start=False) == after
    started = [*MESSAGES[0], {"role": "assistant", "content": "It is "}]
    assert template.render(started, continue_final_message=True).endswith("<|im_start|>assistant\nIt is ")
    with pytest.raises(InvalidParameter, match="rewrites its content"):
        template_of("{{ messages[0].content }}", tokenizer).render(started, continue_final_message=True)


def test_stop_words_are_the_end_tokens_the_template_spells(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = template_of(CHATML, tokenizer)
    assert template.stop_words == ["<|im_end|>"]
    assert template.stop_token_ids(tokenizer) == [tokenizer.special_tokens["<|im_end|>"]]
    assert template_of("no ends", tokenizer).stop_words == []
    assert template_of(CHATML, tokenizer, stop_words=["x"]).stop_words == ["x"]
    trained = train_byte_level(special=["<|end|>", "<|return|>"])
    trained.save(str(tmp_path / "tokenizer.json"))
    assert template_of("<|end|><|return|>", Tokenizer(tmp_path)).stop_words == [], (
        "one answer of gpt-oss has several <|end|>"
    )


def test_strftime_now(tokenizer: Tokenizer) -> None:
    years = {str(datetime.now().year), str(datetime.now().year + 1)}
    assert template_of("{{ strftime_now('%Y') }}", tokenizer).render(MESSAGES[0]) in years


def test_refusals_and_failures_are_the_requests(tokenizer: Tokenizer) -> None:
    cases = {
        "{{ raise_exception('roles must alternate') }}": "roles must alternate",
        "{{ messages[0].content + 1 }}": "fails on these messages",
        "{{ messages[0].missing.deeper }}": "refuses these messages",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "without end",
    }
    for source, message in cases.items():
        with pytest.raises(InvalidParameter, match=message):
            template_of(source, tokenizer).render(MESSAGES[0])


def test_the_servers_variables_cannot_be_passed(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidParameter, match="bos_token"):
        template_of(CHATML, tokenizer).render(MESSAGES[0], bos_token="x")
    assert template_of("{{ colour }}", tokenizer).render(MESSAGES[0], colour="red") == "red"


def test_a_template_that_does_not_compile_names_the_way_out(tokenizer: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match="--chat-template"):
        template_of("{% for %}", tokenizer)
    with pytest.raises(CheckpointError, match="characters"):
        template_of("x" * (1 << 21), tokenizer)
