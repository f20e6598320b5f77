"""The engine's own histograms: what is counted, and that it survives its way through plain numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from lmdeploy.engine import step_times
from lmdeploy.engine.request import Request, SamplingParams
from lmdeploy.engine.scheduler import StepPlan
from lmdeploy.engine.state import RequestState
from lmdeploy.engine.step_times import BOUNDS, StepTimes, read


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Every look at the clock is a second later."""
    ticks = itertools.count(100)
    monkeypatch.setattr(step_times.time, "monotonic", lambda: float(next(ticks)))
    return ticks


def counts(times: StepTimes, name: str) -> dict[str, float]:
    """How many values fell into each bucket that is not empty."""
    buckets, _ = read(times.numbers(), name)
    before = [0.0, *(count for _, count in buckets)]
    return {bound: count - less for (bound, count), less in zip(buckets, before, strict=False) if count > less}


def new_state(**times: float) -> RequestState:
    return RequestState(Request("a", [1], SamplingParams()), 0, b"", **times)  # type: ignore[arg-type]


def step(*num_tokens: int, state: RequestState | None = None, num_sampled: int = 0) -> StepPlan:
    """A plan with a part of each of these lengths, of which the first num_sampled sample."""
    one = state or new_state()
    return StepPlan.of(1, [(one, 0, count, number < num_sampled) for number, count in enumerate(num_tokens)])


def test_a_step_counts_its_tokens_and_its_time(clock: Iterator[int]) -> None:
    times = StepTimes()
    times.begin()
    times.end_step(step(10, 6, num_sampled=2))
    times.end_step(step(17))
    assert counts(times, "iteration_tokens") == {"16.0": 1, "32.0": 1}
    assert read(times.numbers(), "iteration_tokens")[1] == 33
    assert counts(times, "iter_token_latency") == {"1.0": 2}
    times.end_step(step(19_998, 1, 1, num_sampled=3))
    assert counts(times, "iteration_tokens")["+Inf"] == 1
    assert counts(times, "iter_token_latency") == {"1.0": 5}


def test_a_pause_between_steps_is_not_theirs(clock: Iterator[int]) -> None:
    times = StepTimes()
    times.end_step(step(1, num_sampled=1))
    for _ in range(50):
        next(clock)
    times.begin()
    times.end_step(step(1, num_sampled=1))
    assert counts(times, "iter_token_latency")["1.0"] == 1


def test_a_request_is_divided_at_its_start_and_its_first_token(clock: Iterator[int]) -> None:
    times, state = StepTimes(), new_state(queued_s=98.0, started_s=99.0)
    times.end_step(step(8, state=state))  # at 100: a part of its prompt
    times.end_step(step(8, state=state, num_sampled=1))
    times.end_step(step(1, state=state, num_sampled=1))
    next(clock)
    state.is_finished = True
    times.end_step(step(1, state=state, num_sampled=1))  # at 104
    times.end_step(step(1, state=state, num_sampled=1))  # was in flight when it ended
    names = ("queue_time", "prefill_time", "decode_time", "inference_time")
    assert [read(times.numbers(), name)[1] for name in names] == [1.0, 2.0, 3.0, 5.0]
    assert [sum(counts(times, name).values()) for name in names] == [1, 1, 1, 1]


@pytest.mark.parametrize("name", BOUNDS)
def test_nothing_told_reads_as_nothing(name: str) -> None:
    buckets, total = read({}, name)
    assert (buckets[-1], total) == (("+Inf", 0.0), 0.0)
    assert [float(bound) for bound, _ in buckets[:-1]] == list(BOUNDS[name])
