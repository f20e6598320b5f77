from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdeploy import turbomind as tm
from lmdeploy.async_engine import AsyncEngine
from lmdeploy.chat_template import choose_chat_template
from lmdeploy.engine.request import Request
from lmdeploy.errors import InvalidParameter, PromptTooLong
from lmdeploy.tokenizer import Tokenizer
from tests.fakes import FakeClient, Script
from tests.tiny_model import make_tiny_llama

MakeModel = Callable[..., tm.TurboMind]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_model(tiny: Path) -> Iterable[MakeModel]:
    models: list[tm.TurboMind] = []

    def make(script: Script, **client: Any) -> tm.TurboMind:
        tokenizer = Tokenizer.from_path(tiny)
        template = choose_chat_template(tiny, tokenizer, {}, None)
        models.append(tm.TurboMind(AsyncEngine(tiny, FakeClient(script, **client), tokenizer, template)))
        return models[-1]

    yield make
    for model in models:
        model.close()


def fake(model: tm.TurboMind) -> FakeClient:
    assert isinstance(model.engine.client, FakeClient)
    return model.engine.client


def test_the_loop_of_the_tutorial(tiny: Path) -> None:
    tm_model = tm.TurboMind.from_pretrained(str(tiny), model_name="internlm2", cache_max_entry_count=64)
    generator = tm_model.create_instance()
    prompt = tm_model.model.get_prompt("the river")
    input_ids = tm_model.tokenizer.encode(prompt)
    rounds = 0
    for outputs in generator.stream_infer(session_id=0, input_ids=[input_ids], request_output_len=16, random_seed=1):
        res, tokens = outputs[0]
        rounds += 1
    assert rounds == 1
    assert isinstance(res, torch.Tensor)
    assert tokens == len(res) > 0
    assert isinstance(tm_model.tokenizer.decode(res.tolist()), str)
    tm_model.close()


def test_defaults_are_those_of_the_first_version(make_model: MakeModel) -> None:
    model = make_model(lambda request: [70, 3])
    outputs = list(model.create_instance().stream_infer(0, [[5, 6]]))
    assert [(ids.tolist(), count) for ids, count in outputs[0]] == [([70], 1)]
    sampling = fake(model).requests[0].sampling
    assert (sampling.max_new_tokens, sampling.top_p, sampling.top_k, sampling.temperature) == (512, 0.8, 40, 0.8)
    assert (sampling.repetition_penalty, sampling.stop_token_ids) == (1.0, (3,))


def test_streamed_outputs_hold_all_ids_so_far(make_model: MakeModel) -> None:
    model = make_model(lambda request: [70, 71, 72, 3])
    outputs = [batch[0] for batch in model.create_instance().stream_infer(0, [5, 6], stream_output=True)]
    assert [ids.tolist() for ids, _ in outputs] == [[70], [70, 71], [70, 71, 72], [70, 71, 72]]
    assert [count for _, count in outputs] == [1, 2, 3, 3]


def test_a_batch_has_a_session_for_each_item(make_model: MakeModel) -> None:
    model = make_model(lambda request: [request.prompt_ids[0]] * len(request.prompt_ids))
    generator = model.create_instance()
    (outputs,) = generator.stream_infer([1, 2], [[5, 5], [6, 6, 6]])
    assert [ids.tolist() for ids, _ in outputs] == [[5, 5], [6, 6, 6]]
    with pytest.raises(InvalidParameter, match="session_id=1"):
        list(generator.stream_infer(1, [[5], [6]]))


def test_a_session_goes_on_until_sequence_end(make_model: MakeModel) -> None:
    model = make_model(lambda request: [70, 3])
    generator = model.create_instance()

    def turn(ids: list[int], **kwargs: Any) -> list[int]:
        list(generator.stream_infer(7, [ids], **kwargs))
        return fake(model).requests[-1].prompt_ids

    assert turn([5]) == [5]
    assert turn([6], sequence_start=False) == [5, 70, 6]
    assert turn([8], sequence_start=False, step=2) == [5, 70, 8]  # back to before the second turn
    assert turn([9], sequence_start=False, sequence_end=True) == [5, 70, 8, 70, 9]
    assert turn([10], sequence_start=False) == [10]
    assert turn([11]) == [11]
    generator.end(7)
    assert turn([12], sequence_start=False) == [12]


def test_a_refused_turn_leaves_the_session_as_it_was(make_model: MakeModel) -> None:
    model = make_model(lambda request: [70, 3], session_len=16)
    generator = model.create_instance()
    list(generator.stream_infer(0, [[5]]))
    with pytest.raises(PromptTooLong):
        list(generator.stream_infer(0, [[6] * 20], sequence_start=False))
    list(generator.stream_infer(0, [[7]], sequence_start=False))
    assert fake(model).requests[-1].prompt_ids == [5, 70, 7]


def test_stop_ends_what_runs_in_the_session(make_model: MakeModel) -> None:
    def endless(request: Request) -> Iterable[int]:
        return itertools.repeat(70)

    model = make_model(endless)
    generator = model.create_instance()
    stream = generator.stream_infer(0, [[5]], request_output_len=100_000, stream_output=True)
    next(stream)
    assert list(generator.stream_infer(0, [[5]], stop=True)) == []
    assert list(stream)[-1][0][1] < 100_000
    assert fake(model).wait_idle()


def test_ignore_eos_runs_on(make_model: MakeModel) -> None:
    model = make_model(lambda request: [70, 3, 71])
    (outputs,) = model.create_instance().stream_infer(0, [[5]], ignore_eos=True)
    assert outputs[0][0].tolist() == [70, 3, 71]


def test_a_turn_by_get_prompt_goes_on_as_the_whole_conversation_would(make_model: MakeModel) -> None:
    model = make_model(lambda request: [70, 3])
    generator = model.create_instance()
    for number, query in enumerate(("hi", "and then?")):
        ids = model.tokenizer.encode(model.model.get_prompt(query, number == 0))
        list(generator.stream_infer(0, [ids], sequence_start=number == 0))
    answer = model.tokenizer.decode([70])
    turns = (("user", "hi"), ("assistant", answer), ("user", "and then?"))
    messages = [{"role": role, "content": content} for role, content in turns]
    assert fake(model).requests[-1].prompt_ids == model.engine.encode(messages)
