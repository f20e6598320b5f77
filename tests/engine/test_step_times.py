"""The engine's own histograms: what is counted, and that it survives its way through plain numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from lmdeploy.engine import step_times
from lmdeploy.engine.request import Request, SamplingParams
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


def test_a_step_counts_its_tokens_and_its_time(clock: Iterator[int]) -> None:
    times = StepTimes()
    times.begin()
    times.end_step(16, 2)
    times.end_step(17, 0)
    assert counts(times, "iteration_tokens") == {"16.0": 1, "32.0": 1}
    assert read(times.numbers(), "iteration_tokens")[1] == 33
    assert counts(times, "iter_token_latency") == {"1.0": 2}
    times.end_step(20_000, 3)
    assert counts(times, "iteration_tokens")["+Inf"] == 1
    assert counts(times, "iter_token_latency") == {"1.0": 5}


def test_a_pause_between_steps_is_not_theirs(clock: Iterator[int]) -> None:
    times = StepTimes()
    times.end_step(1, 1)
    for _ in range(50):
        next(clock)
    times.begin()
    times.end_step(1, 1)
    assert counts(times, "iter_token_latency")["1.0"] == 1


def test_a_request_is_divided_at_its_start_and_its_first_token() -> None:
    times = StepTimes()
    state = RequestState(Request("a", [1], SamplingParams()), 0, b"", queued_s=10.0, started_s=11.0, first_token_s=13.0)
    times.end_request(state, 17.0)
    sums = {name: read(times.numbers(), name)[1] for name in BOUNDS}
    assert sums == {
        "queue_time": 1.0, "prefill_time": 2.0, "decode_time": 4.0, "inference_time": 6.0,
        "iteration_tokens": 0.0, "iter_token_latency": 0.0,
    }  # fmt: skip


def test_what_never_ran_has_no_times() -> None:
    times = StepTimes()
    times.end_request(RequestState(Request("a", [1], SamplingParams()), 0, b""), 1.0)
    assert not any(times.numbers().values())


@pytest.mark.parametrize("name", BOUNDS)
def test_nothing_told_reads_as_nothing(name: str) -> None:
    buckets, total = read({}, name)
    assert (buckets[-1], total) == (("+Inf", 0.0), 0.0)
    assert [float(bound) for bound, _ in buckets[:-1]] == list(BOUNDS[name])
