"""Requests made to hurt: ill-typed, huge or contradictory. They are refused, or answered without harm to others."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lmdeploy.engine.core import Engine
from lmdeploy.engine.request import Request, SamplingParams
from lmdeploy.errors import InvalidParameter
from lmdeploy.kernels import cpu
from tests.engine.driver import greedy, make_engine, run
from tests.tiny_model import make_tiny_llama

VOCAB = 384


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Engine:
    return make_engine(tiny_llama, enable_prefix_caching=True)


@pytest.mark.parametrize(
    "sampling",
    [
        {"logit_bias": {1: 10**400}},
        {"logit_bias": {1: 10**30}},
        {"logit_bias": {1: 1e39}},
        {"logit_bias": {1.5: 1.0}},
        {"logit_bias": {"1": 1.0}},
        {"top_k": 1.5, "temperature": 1.0},
        {"logprobs": 1.5},
        {"logprobs": VOCAB + 1},
        {"max_new_tokens": 1.5},
        {"repetition_ngram_size": 2.5, "repetition_ngram_threshold": 2},
        {"stop_token_ids": (1.5,), "min_new_tokens": 3},
        {"stop_token_ids": 7},
        {"bad_token_ids": (True,)},
        {"bad_token_ids": (np.int64(3),)},
        {"bad_token_sequences": ((1, 2),) * 5000},
        {"seed": 2**70},
        {"seed": 0.5},
        {"prompt_logprobs": 1},
        {"return_logits": "some"},
    ],
)
def test_an_ill_typed_or_huge_parameter_is_refused(engine: Engine, sampling: dict[str, object]) -> None:
    with pytest.raises(InvalidParameter):
        engine.add(greedy("r", [1, 2, 3], **{"max_new_tokens": 4, **sampling}))  # type: ignore[arg-type]
    assert not engine.has_work


@pytest.mark.parametrize(
    "request_",
    [
        Request("r", [1, 2.5], SamplingParams()),  # type: ignore[list-item]
        Request("r", [True], SamplingParams()),
        Request("r", "12", SamplingParams()),  # type: ignore[arg-type]
        Request(5, [1], SamplingParams()),  # type: ignore[arg-type]
        Request("\ud800", [1], SamplingParams()),
        Request("r", [1], SamplingParams(), cache_salt="\ud800"),
        Request("r", [1], SamplingParams(), cache_salt=None),  # type: ignore[arg-type]
    ],
)
def test_a_request_that_could_not_travel_to_another_process_is_refused(engine: Engine, request_: Request) -> None:
    with pytest.raises(InvalidParameter):
        engine.add(request_)


def test_whole_numbers_bias_as_floats_do(engine: Engine) -> None:
    whole = run(engine, [greedy("r", [1, 2, 3], 3, logit_bias={7: 100})])["r"]
    assert whole.token_ids == [7, 7, 7]


def test_extremes_that_are_allowed(engine: Engine) -> None:
    plain = run(engine, [greedy("r", [1, 2, 3], 4)])["r"].token_ids
    assert run(engine, [greedy("r", [1, 2, 3], 4, temperature=1e-30)])["r"].token_ids == plain
    everything = run(engine, [greedy("r", [1, 2, 3], 4, logprobs=VOCAB)])["r"]
    assert everything.logprobs is not None
    assert [len(logprobs) for logprobs in everything.logprobs] == [VOCAB] * 4
    banned = dict.fromkeys(range(VOCAB), float("-inf"))
    failed = run(engine, [greedy("r", [1, 2, 3], 4, logit_bias=banned), greedy("s", [1, 2, 3], 4)])
    assert failed["r"].finish_reason == "error"
    assert failed["s"].token_ids == plain


def test_long_lists_cost_nothing_per_token(tmp_path: Path) -> None:
    """A bias for every token and 100,000 stop tokens are laid out once, not once a step."""
    vocab = 100_000
    model = make_tiny_llama(
        tmp_path / "m", vocab, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    engine = make_engine(model)
    lists = {"logit_bias": dict.fromkeys(range(vocab), 0.5), "stop_token_ids": tuple(range(1, vocab))}

    def seconds(name: str, count: int, **sampling: object) -> float:
        started = time.perf_counter()
        output = run(engine, [greedy(name, [1, 2, 3], count, min_new_tokens=count, **sampling)])[name]
        assert len(output.token_ids) == count
        return time.perf_counter() - started

    seconds("warm", 4)
    first = seconds("first", 1, **lists)
    assert seconds("whole", 60, **lists) - first < 60 * 0.004 + 4 * seconds("plain", 60)


def test_a_prompts_logprobs_come_once_and_whole(tiny_llama: Path) -> None:
    for steps_in_flight in (1, 2, 3):
        engine = make_engine(tiny_llama, max_prefill_token_num=8, max_batch_size=4, max_steps_in_flight=steps_in_flight)
        for length in (1, 2, 9, 17, 60):
            engine.add(greedy(str(length), list(range(length)), 5, prompt_logprobs=True))
            lengths = []
            while engine.has_work:
                lengths += [len(o.prompt_logprobs) for o in engine.step() if o.prompt_logprobs is not None]
            assert lengths == [length - 1]


@pytest.mark.parametrize("has_kernels", [True, False])
def test_garbage_in_free_blocks_reaches_nobody(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, has_kernels: bool
) -> None:
    """What a failed request has left in the cache, NaN perhaps, must not fail those that come after it."""
    if not has_kernels:
        monkeypatch.setattr(cpu, "can_run", lambda *tensors: False)
    engine = make_engine(tiny_llama)
    requests = [greedy("short", [1, 2, 3], 20), greedy("long", list(range(40)), 20)]
    expected = run(engine, requests)
    engine.runner.kv_cache.data.fill_(float("nan"))
    actual = run(engine, requests)
    assert [actual[r.request_id].token_ids for r in requests] == [expected[r.request_id].token_ids for r in requests]
    assert torch.isnan(engine.runner.kv_cache.data).any()
