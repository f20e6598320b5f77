"""From a response_format to a grammar in llguidance's form: schemas checked keyword by keyword, sizes and depths bounded.

It knows no engine; what a grammar needs of the vocabulary is checked where it is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher

from lmdeploy.engine.guided import LIMITS, GuidedVocabulary
from lmdeploy.errors import InvalidGrammar

if TYPE_CHECKING:
    from lmdeploy.tokenizer import Tokenizer

MAX_CHARS = 1 << 18
MAX_DEPTH = 64
_MAX_MESSAGE_CHARS = 400
_OPTIONS = {
    "lenient": False,
    "coerce_one_of": True,
    # Without a bound a model that has nothing to say goes on with white space until its tokens end.
    "whitespace_pattern": r"[ \n\t]{0,24}",
}

_ANNOTATIONS = frozenset({
    "$schema", "$id", "$anchor", "$comment", "title", "description", "default", "examples", "example", "deprecated",
    "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "discriminator",
})  # fmt: skip
_PLAIN = frozenset({
    "type", "enum", "const", "$ref", "required", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "minLength", "maxLength", "pattern", "format", "minItems", "maxItems", "minProperties", "maxProperties",
})  # fmt: skip
_SCHEMA = frozenset({"additionalProperties", "additionalItems", "items"})
_SCHEMA_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems", "items"})
_SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})


def grammar_of(response_format: Mapping[str, Any]) -> str | None:
    """The grammar of an answer; None if any text will do.

    response_format: {"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": ...} or the
    schema itself}, {"type": "regex_schema", "regex_schema": ...}, {"type": "grammar", "grammar": Lark}, or
    {"type": "llguidance", "grammar": ...}, which is passed on. Raises InvalidGrammar.
    """
    if isinstance(response_format, Mapping) and response_format.get("type") == "llguidance":
        return _text(response_format, "grammar")
    part = part_of(response_format, "answer")
    return None if part is None else json.dumps({"grammars": [part]})


def part_of(response_format: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The same as one named grammar, which others can refer to as `@name`."""
    if not isinstance(response_format, Mapping):
        raise InvalidGrammar(f"response_format is a {type(response_format).__name__}: give an object with a type")
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return schema_part({"type": "object"}, name)
    if kind == "json_schema":
        return schema_part(_schema(response_format), name)
    if kind in ("regex_schema", "regex"):
        return _checked(LLMatcher.grammar_from_regex(_text(response_format, kind)), name, f"{kind}")
    if kind == "grammar":
        return {"name": name, "lark_grammar": _text(response_format, "grammar")}
    raise InvalidGrammar(
        f"response_format.type is {kind!r}: use text, json_object, json_schema, regex_schema or grammar"
    )


def schema_part(schema: Mapping[str, Any] | bool, name: str, where: str = "the JSON schema") -> dict[str, Any]:
    """A JSON schema as one named grammar. Raises InvalidGrammar naming the first keyword that cannot be enforced."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    _check_size(schema, where)
    _check_keywords(schema, where)
    try:
        grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides=_OPTIONS)  # type: ignore[arg-type]
    except ValueError as error:
        raise InvalidGrammar(f"{where} is malformed: {error}") from None
    return _checked(grammar, name, where)


def _schema(response_format: Mapping[str, Any]) -> Mapping[str, Any] | bool:
    given = response_format.get("json_schema")
    if isinstance(given, Mapping) and ("schema" in given or "name" in given):
        given = given.get("schema", {})
    if not isinstance(given, (Mapping, bool)):
        raise InvalidGrammar("response_format of type json_schema needs json_schema: {name, schema}, schema an object")
    return given


def _text(response_format: Mapping[str, Any], key: str) -> str:
    value = response_format.get(key)
    if not isinstance(value, str) or not value or len(value) > MAX_CHARS:
        raise InvalidGrammar(f"response_format needs {key}: a text of 1 to {MAX_CHARS:,} characters")
    return value


def _checked(grammar: str, name: str, where: str) -> dict[str, Any]:
    """The single grammar of a serialized one, under its name, if the library takes it as it is."""
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=LIMITS)
    if is_error or messages:
        raise InvalidGrammar(f"{where} cannot be enforced: {' '.join(messages)[:_MAX_MESSAGE_CHARS]}")
    (part,) = json.loads(grammar)["grammars"]
    return {**part, "name": name}


def _check_size(schema: object, where: str) -> None:
    """Bounds before anything recursive looks at it."""
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise InvalidGrammar(f"{where} is nested more than {MAX_DEPTH} deep")
        level = [child for node in level for child in _children(node)]
    try:
        length = len(json.dumps(schema))
    except (TypeError, ValueError) as error:
        raise InvalidGrammar(f"{where} is no JSON: {error}") from None
    if length > MAX_CHARS:
        raise InvalidGrammar(f"{where} has {length:,} characters, at most {MAX_CHARS:,} are taken")


def _children(node: object) -> Iterator[object]:
    if isinstance(node, Mapping):
        yield from node.values()
    elif isinstance(node, (list, tuple)):
        yield from node


def _check_keywords(schema: object, where: str, path: str = "#") -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise InvalidGrammar(f"{where}: at {path} stands a {type(schema).__name__} where a schema belongs")
    for key, value in schema.items():
        here = f"{path}/{key}"
        if key in _SCHEMA_LISTS and isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                _check_keywords(item, where, f"{here}/{index}")
        elif key in _SCHEMA_MAPS and isinstance(value, Mapping):
            for name, item in value.items():
                _check_keywords(item, where, f"{here}/{name}")
        elif key in _SCHEMA:
            _check_keywords(value, where, here)
        elif key in _ANNOTATIONS or key in _PLAIN or (key == "nullable" and value is False):
            continue
        elif not isinstance(key, str) or key == "x-guidance" or not key.startswith("x-"):
            raise InvalidGrammar(
                f"{where}: the keyword {str(key)[:80]!r} at {path[:200]} is not supported; leave it out"
            )


def guided_vocabulary(tokenizer: Tokenizer, end_token_ids: list[int]) -> GuidedVocabulary:
    """The tokens' bytes and which of them are special, as the engine needs them for grammars."""
    tokens = [tokenizer.token_to_bytes(i) for i in range(tokenizer.vocab_size)]
    return GuidedVocabulary(tokens, sorted(tokenizer.special_tokens.values()), end_token_ids)
