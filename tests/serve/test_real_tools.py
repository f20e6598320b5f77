"""The `openai` package against a server whose engine is in its own process: schemas and calls that are enforced."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from tests.serve.live import KEY, running
from tests.tiny_model import make_tiny_llama

PARAMETERS = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}
FIELDS: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 300,
    "seed": 4,
}
TOOLS: Any = [{"type": "function", "function": {"name": "get", "parameters": PARAMETERS, "strict": True}}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048)
    with running(folder) as (address, _):  # noqa: SIM117
        with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
            yield client


def test_a_schema_holds(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": PARAMETERS}}
    answer = client.chat.completions.create(**FIELDS, response_format=form, n=2, logprobs=True)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), PARAMETERS)


def test_a_schema_that_cannot_hold_is_refused(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="uniqueItems"):
            client.chat.completions.create(**FIELDS, response_format=form, stream=stream)


def test_calls_whole_and_streamed(client: openai.OpenAI) -> None:
    forced: Any = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get"}}}
    answer = client.chat.completions.create(**FIELDS, **forced)
    (call,) = answer.choices[0].message.tool_calls or []
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.type == "function"
    assert call.function.name == "get"
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    with client.chat.completions.stream(**FIELDS, **forced) as stream:
        message = stream.get_final_completion().choices[0].message
    (streamed,) = message.tool_calls or []
    assert (streamed.function.name, streamed.function.arguments) == ("get", call.function.arguments)
