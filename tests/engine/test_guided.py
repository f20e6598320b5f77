"""Grammars in the engine: masks, ends, neighbours that go on, failures that stay alone, both clients."""

from __future__ import annotations

import json
import queue
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from llguidance import LLMatcher

from lmdeploy.engine.client import EngineClient, ThreadClient
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.engine.guided import GrammarCompiler, GuidedVocabulary, Matcher, apply_grammars
from lmdeploy.engine.process import ProcessClient
from lmdeploy.engine.request import Request, RequestOutput
from lmdeploy.engine.state import RequestState
from lmdeploy.errors import InvalidGrammar, InvalidParameter
from lmdeploy.grammar import grammar_of
from lmdeploy.kernels import apply_bitmask
from lmdeploy.tokenizer import Tokenizer
from tests.engine.driver import greedy, join, make_engine

EOS = 3


def regex(pattern: str) -> str:
    grammar = grammar_of({"type": "regex_schema", "regex_schema": pattern})
    assert grammar is not None
    return grammar


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.from_path(tiny_llama)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> GuidedVocabulary:
    tokens = [tokenizer.token_to_bytes(i) for i in range(tokenizer.vocab_size)]
    return GuidedVocabulary(tokens, sorted(tokenizer.special_tokens.values()), [EOS])


@pytest.fixture(scope="module")
def compiler(vocabulary: GuidedVocabulary) -> GrammarCompiler:
    return GrammarCompiler(vocabulary, 384)


def guided(name: str, grammar: str, count: int = 60, **sampling: Any) -> Request:
    return greedy(name, [5, 6, 7], count, grammar=grammar, stop_token_ids=(EOS,), **sampling)


def run(engine: Engine, compiler: GrammarCompiler, requests: list[Request]) -> dict[str, RequestOutput]:
    joined: dict[str, RequestOutput] = {}
    for request in requests:
        grammar = request.sampling.grammar
        engine.add(request, None if grammar is None else compiler.compile(grammar))
    while engine.has_work:
        for output in engine.step():
            join(joined, output)
    return joined


def text_of(tokenizer: Tokenizer, output: RequestOutput) -> str:
    return tokenizer.decode([token for token in output.token_ids if token != EOS])


def test_a_mask_is_read_bit_by_bit() -> None:
    numbers = torch.randint(0, 2, (3, 100), generator=torch.Generator().manual_seed(0)).bool()
    words = [
        [sum(int(row[32 * w + b]) << b for b in range(32) if 32 * w + b < 100) for w in range(4)] for row in numbers
    ]
    logits = torch.ones(5, 100)
    apply_bitmask(logits, torch.tensor(words, dtype=torch.int64).to(torch.int32), torch.tensor([4, 0, 2]))
    assert torch.equal(logits[[4, 0, 2]], torch.where(numbers, 1.0, -torch.inf))
    assert torch.equal(logits[[1, 3]], torch.ones(2, 100))


def test_only_rows_with_a_grammar_are_masked(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matchers = [None, compiler.compile(regex("ab|cd")), compiler.compile(regex("[0-9]")), None]
    states = [RequestState(guided(str(i), ""), 0, b"", matcher=matcher) for i, matcher in enumerate(matchers)]
    logits = torch.zeros(4, 384)
    apply_grammars(logits, states)
    allowed = [
        {tokenizer.token_to_bytes(i).decode("latin-1") for i in range(384) if row[i] == 0} - {""} for row in logits
    ]
    assert torch.equal(logits[0], torch.zeros(384))
    assert torch.equal(logits[3], torch.zeros(384))
    assert "a" in allowed[1]
    assert "c" in allowed[1]
    assert all("ab".startswith(text) or "cd".startswith(text) for text in allowed[1])
    assert {"0", "9"} <= allowed[2]
    assert all(text.isdigit() and len(text) == 1 for text in allowed[2])


def test_an_answer_may_end_exactly_where_the_grammar_accepts(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(regex("ab{2,3}c?"))
    for byte in b"abbb":
        token = next(i for i in range(384) if tokenizer.token_to_bytes(i) == bytes([byte]))
        mask = matcher.llmatcher.compute_bitmask()
        assert bool(mask[EOS // 8] >> EOS % 8 & 1) == matcher.llmatcher.is_accepting()
        assert not matcher.take(token)
    assert matcher.llmatcher.is_accepting()
    assert matcher.take(next(i for i in range(384) if tokenizer.token_to_bytes(i) == b"c"))
    assert matcher.error == ""


def test_text_that_has_to_come_may_come_in_any_tokens(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    for form in (regex("The river"), json.dumps({"grammars": [{"lark_grammar": 'start: "The river" "x"'}]})):
        mask = compiler.compile(form).llmatcher.compute_bitmask()
        allowed = {tokenizer.token_to_bytes(i) for i in range(384) if mask[i // 8] >> i % 8 & 1}
        vocabulary = {tokenizer.token_to_bytes(i) for i in range(4, tokenizer.vocab_size)}
        assert allowed == {b"The river"[:length] for length in range(1, 10)} & vocabulary
        assert b"The" in allowed


def test_special_tokens_are_never_text(compiler: GrammarCompiler) -> None:
    states = [RequestState(guided("x", ""), 0, b"", matcher=compiler.compile(regex("(?s:.*)")))]
    logits = torch.zeros(1, 384)
    apply_grammars(logits, states)
    assert logits[0, :3].isinf().all()  # <s>, </s>, <|im_start|>
    assert logits[0, EOS] == 0


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 5, "top_p": 0.7, "logprobs": 2}]
)
def test_answers_fit_and_neighbours_do_not_notice(
    tiny_llama: Path, compiler: GrammarCompiler, tokenizer: Tokenizer, sampling: dict[str, Any]
) -> None:
    engine = make_engine(tiny_llama, max_steps_in_flight=2)
    free = [greedy(f"free {i}", [i + 10, i + 11], 20) for i in range(3)]
    alone = run(engine, compiler, [greedy(f"free {i}", [i + 10, i + 11], 20) for i in range(3)])
    patterns = ["call me [A-Za-z]{1,10}", "[0-9]{3}-[0-9]{4}", "(yes|no|maybe)( indeed)?"]
    asked = [guided(p, regex(p), seed=i, **sampling) for i, p in enumerate(patterns)]
    answers = run(engine, compiler, [request for pair in zip(asked, free, strict=True) for request in pair])
    for pattern in patterns:
        assert answers[pattern].finish_reason == "stop"
        assert re.fullmatch(pattern, text_of(tokenizer, answers[pattern]))
        if "logprobs" in sampling:
            assert len(answers[pattern].logprobs or []) == len(answers[pattern].token_ids)
    assert {name: answers[name].token_ids for name in alone} == {name: alone[name].token_ids for name in alone}


def test_a_preempted_request_keeps_its_place(tiny_llama: Path, compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    engine = make_engine(tiny_llama, cache_max_entry_count=5, max_batch_size=4)
    requests = [guided(f"{i}", regex("([0-9]{4} ){8}"), count=50, seed=i, temperature=1.0) for i in range(4)]
    answers = run(engine, compiler, requests)
    assert engine.scheduler.num_preemptions > 0
    for answer in answers.values():
        assert re.fullmatch("([0-9]{4} ){8}", text_of(tokenizer, answer))


def test_length_cuts_an_answer_that_still_fits(
    tiny_llama: Path, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    answer = run(make_engine(tiny_llama), compiler, [guided("x", regex("(ab)*c{50}"), count=5)])["x"]
    assert answer.finish_reason == "length"
    assert re.fullmatch("(ab)*a?c*", text_of(tokenizer, answer))


def test_bans_that_leave_nothing_fail_that_request_alone(tiny_llama: Path, compiler: GrammarCompiler) -> None:
    banned = tuple(i for i in range(384) if i != EOS)
    stuck, fine = guided("stuck", regex("ab"), bad_token_ids=banned), guided("fine", regex("ab"))
    answers = run(make_engine(tiny_llama), compiler, [stuck, fine])
    assert "grammar allows" in str(answers["stuck"].error)
    assert answers["fine"].finish_reason == "stop"


def test_a_matcher_that_fails_fails_that_request_alone(tiny_llama: Path, compiler: GrammarCompiler) -> None:
    engine = make_engine(tiny_llama)
    broken = compiler.compile(regex("ab"))
    broken.llmatcher.consume_token(EOS)  # which does not fit, and puts it into its error state
    engine.add(guided("broken", regex("ab")), broken)
    answers = run(engine, compiler, [guided("fine", regex("ab")), greedy("free", [9], 4)])
    assert isinstance(answers["broken"].error, InvalidGrammar)
    assert answers["fine"].finish_reason == "stop"
    assert len(answers["free"].token_ids) == 4
    assert engine.stats()["num_free_blocks"] == engine.stats()["num_blocks"]


def test_what_cannot_be_compiled(compiler: GrammarCompiler) -> None:
    for grammar in (
        "",
        "{",
        json.dumps({"grammars": [{"lark_grammar": "start: <|nosuch|>"}]}),
        regex("a").replace("a/", "(/"),
    ):
        with pytest.raises(InvalidGrammar):
            compiler.compile(grammar)
    with pytest.raises(InvalidGrammar, match="no token that ends"):
        GrammarCompiler(GuidedVocabulary([b"a", b"b"]), 2).compile(regex("a"))


def test_matchers_of_one_grammar_are_independent(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    first, second = compiler.compile(regex("ab")), compiler.compile(regex("ab"))
    token = next(i for i in range(384) if tokenizer.token_to_bytes(i) == b"a")
    assert not first.take(token)
    assert first.llmatcher.compute_bitmask() != second.llmatcher.compute_bitmask()


def _random_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    kind = rng.choice(
        ("integer", "boolean", "null", "string", "enum") + (("object", "array", "anyOf") * 2 if depth else ())
    )
    if kind == "enum":
        return {"enum": rng.sample(["a", "bé", 'q"\\', 1, -2, None, True, [1], {"k": 0}], rng.randint(1, 4))}
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 300)}
    if kind == "string":
        low = rng.randint(0, 2)
        return rng.choice([
            {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 4)},
            {"type": "string", "pattern": "^[a-z]{1,3}[0-9]?$"},
            {"type": "string", "format": rng.choice(["date", "ipv4", "uuid"])},
        ])  # fmt: skip
    if kind == "array":
        low = rng.randint(0, 2)
        return {
            "type": "array",
            "items": _random_schema(rng, depth - 1),
            "minItems": low,
            "maxItems": low + rng.randint(0, 2),
        }
    if kind == "anyOf":
        return {"anyOf": [_random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    if kind == "object":
        names = rng.sample(["a", "b", "naïve", "x y", "1"], rng.randint(0, 3))
        required = [name for name in names if rng.random() < 0.7]
        properties = {name: _random_schema(rng, depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def test_every_finished_answer_to_a_random_schema_is_valid(
    tiny_llama: Path, compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    rng = random.Random(20240)
    schemas = [_random_schema(rng, 3) for _ in range(150)]
    requests = []
    for number, schema in enumerate(schemas):
        grammar = grammar_of({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
        assert grammar is not None
        requests.append(guided(f"{number}", grammar, count=250, seed=number, temperature=rng.choice([0.0, 1.0])))
    answers = run(make_engine(tiny_llama, max_batch_size=16, cache_max_entry_count=300), compiler, requests)
    finished = 0
    for number, schema in enumerate(schemas):
        answer = answers[f"{number}"]
        assert answer.finish_reason in ("stop", "length"), answer
        if answer.finish_reason == "stop":
            finished += 1
            value = json.loads(text_of(tokenizer, answer))
            jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())
    assert finished > 100


CONFIG = EngineConfig(dtype="float32", device="cpu", cache_max_entry_count=64, block_size=16)


@pytest.fixture(scope="module", params=[ThreadClient, ProcessClient])
def client(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[EngineClient]:
    client = request.param(tiny_llama, CONFIG)
    yield client
    client.close()


def ask(client: EngineClient, *requests: Request) -> dict[str, RequestOutput]:
    news: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    for request in requests:
        client.submit(request, news.put)
    joined: dict[str, RequestOutput] = {}
    while sum(output.is_finished for output in joined.values()) < len(requests):
        join(joined, news.get(timeout=20))
    return joined


def test_clients_compile_refuse_and_abort(
    client: EngineClient, vocabulary: GuidedVocabulary, tokenizer: Tokenizer
) -> None:
    early = ask(client, guided("early", regex("ab")))["early"]
    assert isinstance(early.error, InvalidGrammar)
    client.load_vocabulary(vocabulary)
    bad = json.dumps({"grammars": [{"lark_grammar": "start: <|nosuch|>"}]})
    answers = ask(client, guided("good", regex("[0-9]{3}")), guided("bad", bad), greedy("free", [9, 10], 5))
    assert re.fullmatch("[0-9]{3}", text_of(tokenizer, answers["good"]))
    assert isinstance(answers["bad"].error, InvalidGrammar)
    assert "nosuch" in str(answers["bad"].error)
    assert len(answers["free"].token_ids) == 5
    news: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    for number in range(20):
        client.submit(guided(f"gone {number}", regex(f"[a-z]{{{number + 200}}}"), count=200), news.put)
        client.abort(f"gone {number}")
    reasons = []
    while len(reasons) < 20:
        output = news.get(timeout=20)
        reasons += [output.finish_reason] if output.is_finished else []
    assert reasons == ["abort"] * 20


def test_a_grammar_that_nothing_compiled_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(InvalidParameter, match="compiled"):
        make_engine(tiny_llama).add(guided("x", regex("ab")))


def test_matcher_takes_nothing_after_an_error(compiler: GrammarCompiler) -> None:
    matcher = Matcher(LLMatcher(compiler._tokenizer, "{"))  # type: ignore[arg-type]
    assert matcher.take(5)
    assert matcher.error
