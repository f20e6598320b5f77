"""Stands in for an engine client: tokens come at scripted times."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from lmdeploy.engine.request import Request, RequestOutput


class FakeClient:
    """Each request's first token comes `prefill_s` after its submission, the others `token_s` apart; requests overlap.

    The clock is time.perf_counter, which `install` replaces by this client's own.
    """

    def __init__(self, prefill_s: float = 0.5, token_s: float = 0.1, session_len: int = 1000) -> None:
        self.info = SimpleNamespace(session_len=session_len, vocab_size=50)
        self.requests: list[Request] = []
        self.error: Exception | None = None
        self.num_missing = 0
        self._prefill_s, self._token_s = prefill_s, token_s
        self._now = 100.0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lmdeploy.bench.timeline.time.perf_counter", lambda: self._now)

    def submit(self, request: Request, deliver: Callable[[RequestOutput], None]) -> None:
        self.requests.append(request)
        submitted = self._now
        count = request.sampling.max_new_tokens - self.num_missing
        for number in range(count):
            self._now = submitted + self._prefill_s + number * self._token_s
            is_last = number == count - 1
            deliver(RequestOutput(request.request_id, [1], "length" if is_last else None, error=self.error))
        self._now = submitted
