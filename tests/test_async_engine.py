from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from lmdeploy.async_engine import AsyncEngine, open_engine
from lmdeploy.chat_template import choose_chat_template
from lmdeploy.chat_template.choose import UnknownTemplate
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.process import ProcessClient
from lmdeploy.engine.request import Request
from lmdeploy.errors import EngineDead, InvalidParameter, PromptTooLong
from lmdeploy.messages import GenerationConfig, Response
from lmdeploy.tokenizer import Tokenizer
from tests.fakes import FakeClient, Script
from tests.tiny_model import make_tiny_llama

MakeEngine = Callable[..., AsyncEngine]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_engine(tiny: Path) -> Iterable[MakeEngine]:
    engines: list[AsyncEngine] = []

    def make(script: Script | None = None, *, has_template: bool = True, **client: Any) -> AsyncEngine:
        tokenizer = Tokenizer.from_path(tiny)
        template = choose_chat_template(tiny, tokenizer, {}) if has_template else UnknownTemplate("of a base model")
        engines.append(AsyncEngine(tiny, FakeClient(script or echo, **client), tokenizer, template))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def echo(request: Request) -> Iterable[int]:
    return list(request.prompt_ids)


def endless(request: Request) -> Iterable[int]:
    return itertools.cycle(request.prompt_ids)


def fake(engine: AsyncEngine) -> FakeClient:
    assert isinstance(engine.client, FakeClient)
    return engine.client


def answers(
    engine: AsyncEngine, prompts: list[Any], config: GenerationConfig | None = None, **kwargs: Any
) -> list[str]:
    texts: dict[int, str] = {}
    for response in engine.stream([(prompt, config) for prompt in prompts], **kwargs):
        texts[response.index] = texts.get(response.index, "") + response.text
    return [texts[index] for index in sorted(texts)]


async def collect(engine: AsyncEngine, *args: Any, **kwargs: Any) -> list[Response]:
    return [response async for response in engine.generate(*args, **kwargs)]


# ---- prompts ----


def test_text_goes_through_the_chat_template_unless_told_otherwise(make_engine: MakeEngine) -> None:
    engine = make_engine()
    ids = engine.encode("the river")
    assert engine.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\nthe river<|im_end|>\n<|im_start|>assistant\n"
    )
    assert engine.encode([{"role": "user", "content": "the river"}]) == ids
    assert engine.encode([{"role": "user", "content": [{"type": "text", "text": "the river"}]}]) == ids
    assert engine.encode("the river", do_preprocess=False) == engine.tokenizer.encode("the river")
    assert engine.encode([5, 6, 7]) == [5, 6, 7]


def test_a_base_model_continues_text(make_engine: MakeEngine) -> None:
    engine = make_engine(has_template=False)
    assert engine.encode("the river") == engine.tokenizer.encode("the river")
    with pytest.raises(InvalidParameter, match="chat template"):
        engine.encode([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (("describe this", "tiger.jpeg"), "vision models are not supported yet"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "vision models"),
        ([{"content": "hi"}], "role"),
        ([{"role": "user", "content": 3}], "int"),
        (3.5, "float"),
        ([], "list"),
        ([None], "list"),
    ],
)
def test_a_prompt_of_no_known_form_is_refused_with_what_to_give(
    make_engine: MakeEngine, prompt: Any, message: str
) -> None:
    with pytest.raises(InvalidParameter, match=message):
        make_engine().encode(prompt)


def test_requests_carry_ids_stop_tokens_and_the_room_left(make_engine: MakeEngine) -> None:
    engine = make_engine(session_len=64)
    answers(engine, ["the river"], GenerationConfig(max_new_tokens=None))
    (request,) = fake(engine).requests
    assert request.prompt_ids == engine.encode("the river")
    assert request.sampling.stop_token_ids == (3,)
    assert request.sampling.max_new_tokens == 64 - len(request.prompt_ids)
    assert request.sampling.temperature == 0.0


# ---- the synchronous face ----


def test_stream_answers_every_prompt_under_its_index(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompts = [f"number {index}" for index in range(7)]
    assert answers(engine, prompts, do_preprocess=False) == prompts
    assert answers(engine, prompts, do_preprocess=False, is_streaming=False) == prompts


def test_a_request_at_fault_fails_alone(make_engine: MakeEngine) -> None:
    engine = make_engine(session_len=16)
    prompts = ["ok", "far too long " * 20, ("text", "image"), "fine"]
    responses = list(engine.stream([(prompt, None) for prompt in prompts], do_preprocess=False, is_streaming=False))
    by_index = {response.index: response for response in responses}
    assert len(responses) == 4
    assert [by_index[index].finish_reason for index in range(4)] == ["length", "error", "error", "length"]
    assert [by_index[index].text for index in range(4)] == ["ok", "", "", "fine"]
    assert by_index[1].error_code == 400
    assert "session_len is 16" in str(by_index[1].error_message)
    assert "vision" in str(by_index[2].error_message)


def test_only_some_batches_are_encoded_ahead(make_engine: MakeEngine) -> None:
    engine = make_engine(max_batch_size=3)
    encoded = []

    def prompts() -> Iterable[tuple[str, None]]:
        for index in range(100):
            encoded.append(index)
            yield f"prompt {index}", None

    stream = engine.stream(prompts(), do_preprocess=False, is_streaming=False)
    next(stream)
    assert len(encoded) <= 4 * 3 + 1
    assert len(list(stream)) == 99
    assert fake(engine).max_active <= 4 * 3


def test_n_answers_to_one_prompt_with_seeds_counted_up(make_engine: MakeEngine) -> None:
    engine = make_engine()
    config = GenerationConfig(n=3, random_seed=10, temperature=1.0)
    stream = engine.stream([("a", config), ("b", None)], do_preprocess=False, is_streaming=False)
    responses = sorted(stream, key=lambda response: response.index)
    assert [response.text for response in responses] == ["a", "a", "a", "b"]
    assert [request.sampling.seed for request in fake(engine).requests] == [10, 11, 12, None]
    assert len({request.request_id for request in fake(engine).requests}) == 4


def test_a_stop_string_ends_the_request_in_the_engine_too(make_engine: MakeEngine) -> None:
    engine = make_engine(endless)
    config = GenerationConfig(stop_words=["er th"], max_new_tokens=200)
    assert answers(engine, ["the river "], config, do_preprocess=False) == ["the riv"]
    (request,) = fake(engine).requests
    assert fake(engine).aborted == [request.request_id]
    assert fake(engine).wait_idle()


def test_leaving_the_stream_aborts_what_still_runs(make_engine: MakeEngine) -> None:
    engine = make_engine(endless)
    stream = engine.stream([(f"prompt {index}", None) for index in range(5)])
    next(stream)
    stream.close()
    assert sorted(fake(engine).aborted) == sorted(request.request_id for request in fake(engine).requests)
    assert fake(engine).wait_idle()


def test_the_death_of_the_engine_reaches_the_waiter_and_the_next(make_engine: MakeEngine) -> None:
    def dying(request: Request) -> Iterable[int]:
        yield 70
        fake(engine).die(EngineDead("gone"))
        yield 71

    engine = make_engine(dying)
    with pytest.raises(EngineDead, match="gone"):
        answers(engine, ["a"])
    with pytest.raises(EngineDead, match="gone"):
        answers(engine, ["a"])


# ---- the asynchronous face ----


def test_generate_streams_one_prompt(make_engine: MakeEngine) -> None:
    engine = make_engine()
    responses = asyncio.run(collect(engine, "the river", do_preprocess=False, request_id="mine", cache_salt="user"))
    assert "".join(response.text for response in responses) == "the river"
    assert responses[-1].finish_reason == "length"
    (request,) = fake(engine).requests
    assert (request.request_id, request.cache_salt) == ("mine", "user")


def test_generate_takes_input_ids_and_n(make_engine: MakeEngine) -> None:
    engine = make_engine()
    ids = engine.tokenizer.encode("the river")
    config = GenerationConfig(n=2)
    responses = asyncio.run(collect(engine, gen_config=config, input_ids=ids, is_streaming=False))
    assert sorted((response.index, response.text) for response in responses) == [(0, "the river"), (1, "the river")]


def test_generate_raises_what_is_wrong_with_the_request(make_engine: MakeEngine) -> None:
    engine = make_engine(session_len=16)
    with pytest.raises(PromptTooLong):
        asyncio.run(collect(engine, "far too long " * 20))
    with pytest.raises(InvalidParameter):
        asyncio.run(collect(engine))
    assert fake(engine).requests == []


def test_many_generate_calls_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def run() -> list[list[Response]]:
        return await asyncio.gather(*(collect(engine, f"number {i}", do_preprocess=False) for i in range(20)))

    texts = ["".join(response.text for response in responses) for responses in asyncio.run(run())]
    assert texts == [f"number {index}" for index in range(20)]


@pytest.mark.parametrize("way", ["close", "cancel"])
def test_a_closed_or_cancelled_iterator_aborts_its_request(make_engine: MakeEngine, way: str) -> None:
    engine = make_engine(endless)
    config = GenerationConfig(max_new_tokens=100_000)

    async def close() -> None:
        iterator = engine.generate("the river", config)
        await anext(iterator)
        await iterator.aclose()

    async def cancel() -> None:
        task = asyncio.create_task(collect(engine, "the river", config))
        while not fake(engine).requests:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(close() if way == "close" else cancel())
    (request,) = fake(engine).requests
    assert fake(engine).aborted == [request.request_id]
    assert fake(engine).wait_idle()


def test_the_synchronous_face_works_inside_a_running_event_loop(make_engine: MakeEngine) -> None:
    engine = make_engine()

    async def run() -> list[str]:
        return answers(engine, ["inside"], do_preprocess=False)

    assert asyncio.run(run()) == ["inside"]


# ---- over a real engine in its own process ----


def test_both_faces_over_an_engine_process(tiny: Path) -> None:
    config = GenerationConfig(max_new_tokens=6, ignore_eos=True, logprobs=1)
    engine = open_engine(str(tiny), EngineConfig(cache_max_entry_count=16), start=ProcessClient)
    try:
        (streamed,) = engine.stream([("the river", config)], is_streaming=False)
        responses = asyncio.run(collect(engine, "the river", config))
        assert [token for response in responses for token in response.token_ids] == streamed.token_ids
        assert len(streamed.logprobs or []) == 6
        with pytest.raises(PromptTooLong):
            asyncio.run(collect(engine, input_ids=[5] * 10_000))
    finally:
        engine.close()
    with pytest.raises(EngineDead):
        asyncio.run(collect(engine, "the river", config))
