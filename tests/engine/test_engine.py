"""The whole engine on a tiny model: batching, chunking, prefix hits and preemption change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmdeploy.engine.core import Engine
from lmdeploy.engine.request import Request, RequestOutput, SamplingParams
from lmdeploy.engine.sampler import Sampler
from lmdeploy.engine.state import RequestState
from lmdeploy.errors import ConfigError, InvalidParameter, PromptTooLong
from tests.engine.driver import greedy, make_engine, replay_uncaptured, run

NUM_BLOCKS = 24
VOCAB = 384


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> Engine:
    return make_engine(tiny_llama)


@pytest.fixture(scope="module", params=[(1, False), (2, False), (3, False), (2, True), (3, True)], ids=str)
def crowded(tiny_llama: Path, request: pytest.FixtureRequest) -> Engine:
    """Small chunks, few blocks, prefix caching; 1 to 3 steps in flight; decode steps prepared as graphs replay them."""
    steps, is_replayed = request.param
    engine = make_engine(
        tiny_llama,
        cache_max_entry_count=NUM_BLOCKS,
        block_size=8,
        max_prefill_token_num=24,
        max_batch_size=6,
        enable_prefix_caching=True,
        max_steps_in_flight=steps,
        session_len=NUM_BLOCKS * 8,
    )
    if is_replayed:
        replay_uncaptured(engine, 6)
    return engine


def one_by_one(engine: Engine, requests: list[Request]) -> dict[str, RequestOutput]:
    outputs = {}
    for request in requests:
        outputs.update(run(engine, [request]))
    return outputs


def assert_same_until_a_tie(request: Request, logits: torch.Tensor, expected: list[int], actual: list[int]) -> None:
    """Equal tokens, up to a first difference that float noise in that position's logits can make."""
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        if a != b:
            assert b in tokens_under_noise(request, expected[:index], logits[index])
            return


def tokens_under_noise(request: Request, output_ids: list[int], logits: torch.Tensor) -> set[int]:
    """What the sampler chooses next under logits [V] that differ from the given ones by float noise."""
    generator = torch.Generator().manual_seed(0)
    state = RequestState(request, seed=request.sampling.seed or 0, root=b"")
    state.token_ids += output_ids
    state.num_computed_tokens = len(state.token_ids)  # the step that samples is in flight
    scale = 1e-5 * logits.abs().max()
    noisy = [logits + scale * torch.randn(logits.shape, generator=generator) for _ in range(64)]
    return {int(Sampler(len(logits), logits.device)(row[None].clone(), [state])) for row in noisy}


prompt = st.lists(st.integers(0, 3), min_size=1, max_size=60)
params = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 40),
        "temperature": st.sampled_from([0.0, 0.0, 0.8]),
        "top_k": st.sampled_from([0, 5]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.7]),
        "frequency_penalty": st.sampled_from([0.0, -0.2]),
        "seed": st.integers(0, 99),
    }
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(jobs=st.lists(st.tuples(prompt, params), min_size=1, max_size=12))
def test_a_crowded_engine_answers_as_one_by_one(
    plain: Engine, crowded: Engine, jobs: list[tuple[list[int], dict[str, float]]]
) -> None:
    def requests(**more: object) -> list[Request]:
        return [Request(str(i), ids, SamplingParams(**values, **more)) for i, (ids, values) in enumerate(jobs)]  # type: ignore[arg-type]

    expected = one_by_one(plain, requests(return_logits="generation"))
    actual = run(crowded, requests())
    for request in requests():
        output, crowded_output = expected[request.request_id], actual[request.request_id]
        assert output.logits is not None
        assert output.finish_reason == crowded_output.finish_reason == "length"
        assert_same_until_a_tie(request, output.logits, output.token_ids, crowded_output.token_ids)
    assert crowded.stats()["num_free_blocks"] == NUM_BLOCKS


def test_crowding_really_preempts_and_hits_prefixes(crowded: Engine) -> None:
    shared = [5] * 40
    before = crowded.stats()["num_preemptions"]
    requests = [greedy(str(i), [*shared, i], max_new_tokens=60) for i in range(6)]
    first = run(crowded, [greedy("warm", [*shared, 9])])
    outputs = run(crowded, requests)
    assert first["warm"].cached_tokens in (0, 40)
    assert all(output.cached_tokens == 40 for output in outputs.values())
    assert crowded.stats()["num_preemptions"] > before
    assert crowded.stats()["num_free_blocks"] == NUM_BLOCKS


def test_a_salt_separates_prefix_caches(crowded: Engine) -> None:
    prompt_ids = [7] * 30
    run(crowded, [greedy("a", prompt_ids)])
    salted = Request("b", prompt_ids, SamplingParams(max_new_tokens=2), cache_salt="other user")
    assert run(crowded, [salted])["b"].cached_tokens == 0
    assert run(crowded, [greedy("c", prompt_ids)])["c"].cached_tokens == 24


def test_reports_have_one_row_per_position(crowded: Engine, plain: Engine) -> None:
    prompt_ids = list(range(50))
    sampling = SamplingParams(
        max_new_tokens=6, prompt_logprobs=True, return_logits="all", return_hidden_states="all", logprobs=2
    )
    wide = run(plain, [Request("r", prompt_ids, sampling)])["r"]
    chunked = run(crowded, [Request("r", prompt_ids, sampling), *[greedy(str(i), [i] * 50, 40) for i in range(5)]])["r"]
    for output in (wide, chunked):
        assert output.logits is not None
        assert output.hidden_states is not None
        assert output.prompt_logprobs is not None
        assert output.logprobs is not None
        assert output.logits.shape == (55, VOCAB)
        assert output.hidden_states.shape[0] == 55
        logprobs = torch.log_softmax(output.logits, -1)
        expected = [logprobs[i, token].item() for i, token in enumerate(prompt_ids[1:])]
        assert [values[token] for values, token in zip(output.prompt_logprobs, prompt_ids[1:], strict=True)] == (
            pytest.approx(expected, abs=1e-5)
        )
        for row, values in zip(logprobs, output.prompt_logprobs, strict=False):
            assert set(row.topk(2).indices.tolist()) <= set(values)
        for row, token, reported in zip(logprobs[49:], output.token_ids, output.logprobs, strict=True):
            assert reported[token] == pytest.approx(row[token].item(), abs=1e-5)
            assert set(row.topk(2).indices.tolist()) <= set(reported)
    assert torch.allclose(wide.logits, chunked.logits, atol=1e-3)


def test_scoring_generates_nothing(crowded: Engine) -> None:
    output = run(crowded, [greedy("s", list(range(60)), 0, prompt_logprobs=True)])["s"]
    assert output.token_ids == []
    assert output.finish_reason == "length"
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 59


def test_stop_tokens_end_an_answer(plain: Engine) -> None:
    free = run(plain, [greedy("r", [1, 2, 3])])["r"].token_ids
    stopped = run(plain, [greedy("r", [1, 2, 3], stop_token_ids=(free[4],))])["r"]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free[: free.index(free[4]) + 1]


def test_a_bad_sequence_is_never_completed(crowded: Engine) -> None:
    free = run(crowded, [greedy("r", [1, 2, 3])])["r"].token_ids
    banned = tuple(free[2:5])
    output = run(crowded, [greedy("r", [1, 2, 3], bad_token_sequences=(banned,))])["r"].token_ids
    assert output[:4] == free[:4]
    assert output[4] != free[4]


def test_abort_frees_the_blocks(crowded: Engine) -> None:
    for index in range(4):
        crowded.add(greedy(str(index), [index] * 30, 100))
    for _ in range(6):
        crowded.step()
    for index in range(4):
        output = crowded.abort(str(index))
        assert output is not None
        assert output.finish_reason == "abort"
    while crowded.has_work:
        assert crowded.step() == []
    assert crowded.stats()["num_free_blocks"] == NUM_BLOCKS
    assert crowded.abort("0") is None


@pytest.mark.parametrize(
    ("prompt_ids", "sampling", "error", "words"),
    [
        ([], {}, InvalidParameter, "empty"),
        ([384], {}, InvalidParameter, "384"),
        ([-1], {}, InvalidParameter, "-1"),
        ([1] * 192, {}, PromptTooLong, "192 tokens"),
        ([1], {"temperature": float("nan")}, InvalidParameter, "temperature"),
        ([1], {"top_p": 1.5}, InvalidParameter, "top_p"),
        ([1], {"max_new_tokens": -1}, InvalidParameter, "max_new_tokens"),
        ([1], {"logit_bias": {1: float("nan")}}, InvalidParameter, "logit_bias"),
        ([1], {"bad_token_ids": (999,)}, InvalidParameter, "999"),
        ([1], {"bad_token_sequences": ((),)}, InvalidParameter, "empty"),
        ([1], {"bad_token_ids": tuple(range(VOCAB))}, InvalidParameter, "whole vocabulary"),
    ],
)
def test_a_request_that_cannot_run_is_refused(
    crowded: Engine, prompt_ids: list[int], sampling: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        crowded.add(Request("bad", prompt_ids, SamplingParams(**sampling)))  # type: ignore[arg-type]
    assert not crowded.has_work


def test_the_session_ends_at_its_length(crowded: Engine) -> None:
    output = run(crowded, [greedy("r", [1] * 150, 1000)])["r"]
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 192 - 150


def test_a_pool_of_one_block_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="no room for the KV cache"):
        make_engine(tiny_llama, cache_max_entry_count=1)


def test_a_small_pool_cuts_the_session(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(tiny_llama, cache_max_entry_count=3)
    assert engine.info.session_len == 48
    assert dict(engine.info.memory_plan)["tokens that fit"] == "48"


def test_logits_that_are_reported_keep_no_other_requests_alive(tiny_llama: Path) -> None:
    asked = [greedy(name, [5, 9, 13], 1, return_logits="generation") for name in "abc"]
    for output in run(make_engine(tiny_llama), asked).values():
        assert output.logits is not None
        assert output.logits.untyped_storage().nbytes() == output.logits.nbytes
