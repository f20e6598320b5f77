"""One server behind the proxy: what it serves, what it does now, how it has done. It sends nothing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from anyio import CancelScope

from lmdeploy.serve.proxy.breaker import CircuitBreaker

LATENCY_WINDOW = 15
LATENCY_AGE_S = 120.0


class Node:
    """speed: requests per second, or any measure of which the others' are multiples; None if nobody has told.

    unfinished: requests in work. seen_at: when a probe last succeeded. probe_at: when the next is due.
    """

    def __init__(
        self,
        url: str,
        models: Sequence[str],
        speed: float | None = None,
        *,
        breaker: CircuitBreaker | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = url
        self.models = tuple(models)
        self.speed = speed
        self.breaker = breaker or CircuitBreaker(clock=clock)
        self.unfinished = 0
        self.seen_at = self.probe_at = clock()
        self._clock = clock
        self._latencies: deque[tuple[float, float]] = deque(maxlen=LATENCY_WINDOW)
        self._scopes: set[CancelScope] = set()

    def observe(self, latency_s: float) -> None:
        """A request has taken so long."""
        self._latencies.append((self._clock(), latency_s))

    def latencies(self) -> list[float]:
        """Of the last requests. What is old is left out, so that a node once slow is asked again."""
        horizon = self._clock() - LATENCY_AGE_S
        return [latency for at, latency in self._latencies if at >= horizon]

    @contextmanager
    def working(self) -> Iterator[CancelScope]:
        """A request is with the node. The scope's body is cancelled when the node is lost: `scope.cancelled_caught`."""
        self.unfinished += 1
        is_trial = self.breaker.begin()
        scope = CancelScope()
        self._scopes.add(scope)
        try:
            with scope:
                yield scope
        finally:
            self._scopes.discard(scope)
            self.unfinished -= 1
            if is_trial:
                self.breaker.end()

    def lose(self) -> None:
        """Nothing more is to be expected: whatever waits for the node stops waiting."""
        for scope in list(self._scopes):
            scope.cancel()

    def report(self) -> dict[str, Any]:
        """As `/nodes/status` shows it."""
        return {
            "models": list(self.models),
            "role": "Hybrid",
            "speed": self.speed,
            "unfinished": self.unfinished,
            "latency": self.latencies(),
            "state": self.breaker.state,
            "seen_s_ago": round(self._clock() - self.seen_at, 3),
        }
