"""A circuit breaker: whether a node that has failed is asked again, and when. It knows nothing of HTTP.

Source: M. Nygard, Release It!, chapter "Stability Patterns"
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half_open"]


class CircuitBreaker:
    """closed: requests pass. open: none does. half_open: one at a time does, and its outcome decides.

    It opens after `threshold` failures in a row, or one that is fatal. `may_retry` then says when the back-off is over,
    which doubles each time that the breaker opens without a success between; whoever asks the node then calls `half_open`.
    """

    def __init__(
        self,
        threshold: int = 3,
        backoff_s: float = 1.0,
        max_backoff_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._threshold = threshold
        self._first_backoff_s = self._backoff_s = backoff_s
        self._max_backoff_s = max_backoff_s
        self._clock = clock
        self._state: State = "closed"
        self._num_failures = 0
        self._retry_at = 0.0
        self._has_trial = False

    @property
    def state(self) -> State:
        return self._state

    @property
    def may_retry(self) -> bool:
        """Whether an open breaker's back-off is over."""
        return self._state == "open" and self._clock() >= self._retry_at

    def admits(self) -> bool:
        return self._state == "closed" or (self._state == "half_open" and not self._has_trial)

    def begin(self) -> bool:
        """A request goes to the node. Returns whether it is the trial, which the caller has to `end`."""
        is_trial = self._state == "half_open"
        self._has_trial = self._has_trial or is_trial
        return is_trial

    def end(self) -> None:
        """The trial is over; without a verdict, the next request is one."""
        self._has_trial = False

    def half_open(self) -> None:
        """The node answers probes again."""
        if self._state == "open":
            self._state = "half_open"

    def succeed(self) -> None:
        """The node has answered a request. What had begun before the breaker opened proves nothing."""
        if self._state != "open":
            self._state = "closed"
            self._num_failures = 0
            self._backoff_s = self._first_backoff_s

    def fail(self, *, is_fatal: bool = False) -> bool:
        """The node has failed. Returns whether this has opened the breaker."""
        if self._state == "open":
            if self.may_retry:
                self._delay()
            return False
        self._num_failures += 1
        if self._state == "closed" and not is_fatal and self._num_failures < self._threshold:
            return False
        self._state = "open"
        self._delay()
        return True

    def _delay(self) -> None:
        self._retry_at = self._clock() + self._backoff_s
        self._backoff_s = min(2 * self._backoff_s, self._max_backoff_s)
