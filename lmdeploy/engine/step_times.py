"""Where an engine's time goes, as histograms that travel as plain numbers. It knows neither clients nor Prometheus."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping

from lmdeploy.engine.scheduler import StepPlan
from lmdeploy.engine.state import RequestState

_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16_384.0)
_STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_REQUEST_S = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 480.0, 1920.0)

# Upper bounds of the buckets by name; seconds, but for the tokens of a step.
BOUNDS: dict[str, tuple[float, ...]] = {
    "iteration_tokens": _TOKENS,
    "iter_token_latency": _STEP_S,
    "queue_time": _REQUEST_S,
    "prefill_time": _REQUEST_S,
    "decode_time": _REQUEST_S,
    "inference_time": _REQUEST_S,
}


class StepTimes:
    """Observed by the engine's thread, read by any; a reader may see a step half counted."""

    def __init__(self) -> None:
        self._counts = {name: [0] * (len(bounds) + 1) for name, bounds in BOUNDS.items()}
        self._sums = dict.fromkeys(BOUNDS, 0.0)
        self._last_s = 0.0

    def begin(self) -> None:
        """A step starts on an engine that had none in flight; the time before it is nobody's."""
        self._last_s = time.monotonic()

    def end_step(self, plan: StepPlan) -> None:
        """A step has ended, and what it gave is known to its requests."""
        now = time.monotonic()
        self._observe("iteration_tokens", int(plan.num_tokens.sum()))
        if num_sampled := sum(plan.samples):
            self._observe("iter_token_latency", now - self._last_s, num_sampled)
        self._last_s = now
        if plan.grown is None:  # who repeats a step has had its first token
            for state, samples in zip(plan.states, plan.samples, strict=True):
                if samples and state.first_token_s is None:
                    state.first_token_s = now
        for state in plan.states:
            if state.is_finished and state.started_s is not None:
                self._end(state, state.started_s, now)
                state.started_s = None  # another of its steps may still be in flight

    def _end(self, state: RequestState, started_s: float, now: float) -> None:
        first_s = now if state.first_token_s is None else state.first_token_s
        self._observe("queue_time", started_s - state.queued_s)
        self._observe("prefill_time", first_s - started_s)
        self._observe("decode_time", now - first_s)
        self._observe("inference_time", now - started_s)

    def numbers(self) -> dict[str, float]:
        """For `read`: the count of each bucket as NAME/NUMBER, and the sum as NAME/sum."""
        numbers = {f"{name}/{i}": float(n) for name, counts in self._counts.items() for i, n in enumerate(counts)}
        return numbers | {f"{name}/sum": total for name, total in self._sums.items()}

    def _observe(self, name: str, value: float, weight: int = 1) -> None:
        self._counts[name][bisect_left(BOUNDS[name], value)] += weight
        self._sums[name] += value * weight


def read(numbers: Mapping[str, float], name: str) -> tuple[list[tuple[str, float]], float]:
    """A histogram out of `numbers`: (upper bound, how many up to there) by bucket, and the sum of all values."""
    return list(_cumulated(numbers, name)), numbers.get(f"{name}/sum", 0.0)


def _cumulated(numbers: Mapping[str, float], name: str) -> Iterator[tuple[str, float]]:
    count = 0.0
    for number, bound in enumerate((*map(str, BOUNDS[name]), "+Inf")):
        count += numbers.get(f"{name}/{number}", 0.0)
        yield bound, count
