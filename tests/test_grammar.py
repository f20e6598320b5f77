"""From response_format to a grammar: every form, every refusal with its reason, bounds."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from lmdeploy.engine.guided import GrammarCompiler, GuidedVocabulary
from lmdeploy.errors import InvalidGrammar
from lmdeploy.grammar import MAX_CHARS, MAX_DEPTH, grammar_of, schema_part

_BYTES = GrammarCompiler(GuidedVocabulary([bytes([i]) for i in range(256)] + [b"</s>"], [256], [256]), 257)


def accepts(grammar: str | None, text: str) -> bool:
    """Whether the text is a whole answer, read byte by byte."""
    assert grammar is not None
    matcher = _BYTES.compile(grammar).llmatcher
    return matcher.validate_tokens([*text.encode(), 256]) == len(text.encode()) + 1


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ({"type": "json_object"}, '{"a": [1, null]}', "[1]"),
        (schema({"type": "integer"}), "12", "1.5"),
        ({"type": "json_schema", "json_schema": {"type": "integer"}}, "12", '"x"'),
        (
            schema({"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}),
            "[[],[[]]]",
            "[1]",
        ),
        (schema({"enum": ["a", 1]}), '"a"', '"b"'),
        (schema({"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]}), "3", '"ab"'),
        (schema({"type": "string", "pattern": "^a+$", "maxLength": 3}), '"aaa"', '"aaaa"'),
        (schema({"type": "array", "items": {"type": "integer"}, "minItems": 2}), "[1,2]", "[1]"),
        ({"type": "regex_schema", "regex_schema": "call me [A-Za-z]{1,10}"}, "call me Al", "call me "),
        ({"type": "regex", "regex": "a|b"}, "b", "ab"),
        ({"type": "grammar", "grammar": 'start: "yes" | "no"'}, "no", "maybe"),
    ],
)
def test_forms(form: dict[str, Any], good: str, bad: str) -> None:
    assert accepts(grammar_of(form), good)
    assert not accepts(grammar_of(form), bad)


def test_text_needs_no_grammar() -> None:
    assert grammar_of({"type": "text"}) is None


def test_white_space_is_bounded() -> None:
    grammar = grammar_of({"type": "json_object"})
    assert accepts(grammar, '{\n  "a" : 1\n}')
    assert not accepts(grammar, "{" + " " * 60 + "}")


@pytest.mark.parametrize(
    ("value", "keyword"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"type": "array", "contains": {}}}}, "contains"),
        ({"anyOf": [{"not": {"type": "string"}}]}, "not"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "if"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "string", "nullable": True}, "nullable"),
        ({"type": "string", "maxlength": 3}, "maxlength"),
        ({"x-guidance": {"lenient": True}, "type": "string"}, "x-guidance"),
        ({"type": "string", "format": "zebra"}, "zebra"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"$ref": "http://host/schema"}, "http://host/schema"),
        ({"$dynamicRef": "#a"}, "$dynamicRef"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(value: Any, keyword: str) -> None:
    with pytest.raises(InvalidGrammar) as refused:
        grammar_of(schema(value))
    assert keyword in str(refused.value)


def test_names_of_properties_and_values_are_no_keywords() -> None:
    value = {
        "title": "T", "description": "d", "default": {"not": 1}, "x-own": 1, "type": "object", "required": ["not"],
        "properties": {"not": {"const": {"uniqueItems": True}}}, "additionalProperties": False,
    }  # fmt: skip
    assert accepts(grammar_of(schema(value)), '{"not": {"uniqueItems": true}}')


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": [1]}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": {"a": 3}}}},
        {"type": "json_schema", "json_schema": {"schema": {"type": 5}}},
        {"type": "json_schema", "json_schema": {"schema": {"minimum": float("nan")}}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "integer", "minimum": 5, "maximum": 3}}},
        {"type": "regex_schema"},
        {"type": "regex_schema", "regex_schema": ""},
        {"type": "regex_schema", "regex_schema": "("},
        {"type": "regex_schema", "regex_schema": "(?=a)b"},
        {"type": "regex_schema", "regex_schema": "(" * 20000 + "a" + ")" * 20000},
        {"type": "grammar", "grammar": 5},
        {"type": "grammar", "grammar": "x" * (MAX_CHARS + 1)},
        {"type": "yaml"},
        {},
        "json_object",
    ],
)
def test_malformed_forms(form: Any) -> None:
    with pytest.raises(InvalidGrammar):
        grammar_of(form)


def test_depth_and_size_are_bounded() -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(20_000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InvalidGrammar, match=str(MAX_DEPTH)):
        schema_part(deep, "x")
    with pytest.raises(InvalidGrammar, match="characters"):
        schema_part({"enum": ["x" * 1000] * 300}, "x")


@pytest.mark.parametrize(
    "form",
    [
        {"type": "regex_schema", "regex_schema": "((((a{1,1000}){1,1000}){1,1000}))x"},
        {"type": "regex_schema", "regex_schema": "(a|b|ab)*c(a|b){500}(a*)*(a*)*b"},
        schema({"allOf": [{"anyOf": [{"properties": {f"k{i}_{j}": {}}} for j in range(6)]} for i in range(7)]}),
        schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}),
    ],
)  # fmt: skip
def test_no_form_takes_long(form: dict[str, Any]) -> None:
    started = time.monotonic()
    try:
        matcher = _BYTES.compile(grammar_of(form) or "")
        matcher.llmatcher.compute_bitmask()
    except InvalidGrammar as refused:
        assert str(refused)  # noqa: PT017
    assert time.monotonic() - started < 10


def test_the_compiler_keeps_few_grammars() -> None:
    for number in range(100):
        _BYTES.compile(json.dumps({"grammars": [{"lark_grammar": f'start: "{number}"'}]}))
    assert len(_BYTES._known) <= 32
    assert isinstance(_BYTES._tokenizer, LLTokenizer)
    assert all(isinstance(matcher, LLMatcher) and not matcher.is_error() for matcher in _BYTES._known.values())
