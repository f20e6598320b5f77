"""response_format over HTTP, with a real engine of random weights: answers that fit, refusals, streams, thoughts before."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import pytest

from lmdeploy.async_engine import AsyncEngine, open_engine
from lmdeploy.engine.config import EngineConfig
from lmdeploy.serve.openai.app import create_app
from lmdeploy.serve.settings import ServerSettings
from tests.serve.driver import HELLO, error_of, events
from tests.tiny_model import make_tiny_llama

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {"type": "string", "maxLength": 4}},
    "required": ["n", "s"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
Ask = Callable[..., httpx2.Response]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncEngine]:
    folder = make_tiny_llama(tmp_path_factory.mktemp("guided"), max_position_embeddings=2048)
    engine = open_engine(str(folder), EngineConfig(dtype="float32", device="cpu", cache_max_entry_count=200))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def ask(engine: AsyncEngine) -> Ask:
    """ask(path, body, settings of the server)"""

    def ask(path: str, body: dict[str, Any], **settings: Any) -> httpx2.Response:
        app = create_app(engine, ServerSettings("tiny", **settings))

        async def post() -> httpx2.Response:
            async with httpx2.AsyncClient(
                transport=httpx2.ASGITransport(app), base_url="http://s", timeout=50
            ) as client:
                return await client.post(path, json={"model": "tiny", **body})

        return asyncio.run(post())

    return ask


@pytest.fixture(scope="module")
def chat(ask: Ask) -> Ask:
    def chat(settings: dict[str, Any] | None = None, **fields: Any) -> httpx2.Response:
        body = {"messages": HELLO, "max_tokens": 300, **fields}
        return ask("/v1/chat/completions", body, **(settings or {}))

    return chat


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1.5, "n": 3, "seed": 5},
        {"temperature": 1, "seed": 5, "logprobs": True, "top_logprobs": 2, "logit_bias": {"70": 50, "15": -100}},
        {"temperature": 0, "frequency_penalty": 1.5, "repetition_penalty": 1.3, "ignore_eos": True},
    ],
)
def test_answers_are_valid(chat: Ask, fields: dict[str, Any]) -> None:
    answer = chat(response_format=FORMAT, **fields)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert len(choices) == fields.get("n", 1)
    for choice in choices:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        if "logprobs" in fields:
            assert "".join(entry["token"] for entry in choice["logprobs"]["content"]) == choice["message"]["content"]
    streamed = dict.fromkeys(range(len(choices)), "")
    for chunk in events(chat(response_format=FORMAT, stream=True, **fields)):
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert streamed == {choice["index"]: choice["message"]["content"] for choice in choices}


def test_other_forms_and_the_other_endpoint(chat: Ask, ask: Ask) -> None:
    form = {"type": "regex_schema", "regex_schema": "call me [A-Z]{3}"}
    assert re.fullmatch("call me [A-Z]{3}", chat(response_format=form).json()["choices"][0]["message"]["content"])
    lark = {"type": "grammar", "grammar": 'start: ("yes" | "no") "!"{2}'}
    answer = ask("/v1/completions", {"prompt": ["a", "b"], "response_format": lark, "max_tokens": 50})
    assert all(choice["text"] in ("yes!!", "no!!") for choice in answer.json()["choices"])
    assert chat(response_format={"type": "text"}, max_tokens=2).status_code == 200


def test_a_stop_string_still_ends_an_answer(chat: Ask) -> None:
    form = {"type": "regex_schema", "regex_schema": "[ab]{10}zz[ab]{10}"}
    choice = chat(response_format=form, stop=["zz"]).json()["choices"][0]
    assert re.fullmatch("[ab]{10}", choice["message"]["content"])
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"uniqueItems": True}}}}, "uniqueItems"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "llguidance", "grammar": "{}"}}, "response_format.type"),
        ({"response_format": {"type": "regex_schema", "regex_schema": "("}}, "regex"),
        ({"response_format": {"type": "grammar", "grammar": "start: <|nosuch|>"}}, "nosuch"),
        ({"response_format": {"type": "grammar", "grammar": "no lark at all ("}}, "grammar"),
        ({"response_format": FORMAT, "min_new_tokens": 3}, "min_new_tokens"),
        ({"response_format": FORMAT, "logit_bias": {"500": 1}}, "logit_bias"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_have_a_reason(chat: Ask, fields: dict[str, Any], message: str, stream: bool) -> None:
    answer = chat(stream=stream, **fields)
    assert answer.status_code == 400
    assert message in error_of(answer)["message"]


@pytest.mark.parametrize("parser", ["default", "deepseek-r1"])
def test_the_grammar_holds_from_the_end_of_thoughts(chat: Ask, parser: str) -> None:
    """A random model hardly ever ends its thoughts; where they are forbidden the answer is valid at once."""
    fields = {"response_format": FORMAT, "temperature": 1, "seed": 3}
    free = chat({"reasoning_parser": parser}, **fields).json()["choices"][0]["message"]
    if parser == "deepseek-r1" or free["reasoning_content"]:
        assert free["reasoning_content"]
        assert free["content"] == ""
    else:
        jsonschema.validate(json.loads(free["content"]), SCHEMA)
    closed = [*HELLO, {"role": "assistant", "content": "<think>x</think>"}]
    answer = chat(
        {"reasoning_parser": parser}, messages=closed, continue_final_message=True, add_generation_prompt=False, **fields
    )  # fmt: skip
    message = answer.json()["choices"][0]["message"]
    assert message["reasoning_content"] is None
    jsonschema.validate(json.loads(message["content"]), SCHEMA)


def test_a_grammar_after_thoughts_that_end(engine: AsyncEngine) -> None:
    """The composed grammar itself: thoughts, `</think>`, then the schema and nothing else."""
    from lmdeploy.engine.guided import GrammarCompiler, GuidedVocabulary
    from lmdeploy.serve.parsers.formats import AnswerFormats, Demand

    tokens = [engine.tokenizer.token_to_bytes(i) for i in range(engine.tokenizer.vocab_size)]
    compiler = GrammarCompiler(GuidedVocabulary(tokens, [0, 1, 2, 3], [3]), 384)
    formats = AnswerFormats(engine, reasoning_parser="default")
    for thinking, texts in (
        ("maybe", ['<think>so {"n"</think>\n\n{"n": 1, "s": ""}', '{"n": 1, "s": ""}']),
        ("open", ['so {"n"</think>\n\n{"n": 1, "s": ""}', '</think>{"n": 1, "s": ""}']),
    ):
        grammar = formats.grammar(Demand(response_format=FORMAT), thinking)  # type: ignore[arg-type]
        assert grammar is not None
        for text in texts:
            ids = [*engine.tokenizer.encode(text), 3]
            assert compiler.compile(grammar["grammar"]).llmatcher.validate_tokens(ids) == len(ids), text
        ids = [*engine.tokenizer.encode(texts[0] + "x"), 3]
        assert compiler.compile(grammar["grammar"]).llmatcher.validate_tokens(ids) < len(ids)


def test_the_vocabulary_is_told_once(serve: Any, tiny: Path) -> None:
    served = serve()
    for _ in range(2):
        served.chat(response_format=FORMAT, max_tokens=2)
    (vocabulary,) = served.client.vocabularies
    assert len(vocabulary.tokens) == served.engine.tokenizer.vocab_size
    assert vocabulary.special_ids == [0, 1, 2, 3]
    assert served.client.requests[0].sampling.grammar == served.client.requests[1].sampling.grammar
    served.chat(max_tokens=2)
    assert served.client.requests[2].sampling.grammar is None
