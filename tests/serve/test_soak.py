"""The short form of the long run; `make soak` is the other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.serve.soak import report, run_soak

SECONDS, SETTLED_S = 14.0, 8.0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_load_and_faults_lose_nothing(tiny: Path) -> None:
    seen = run_soak(tiny, SECONDS, SETTLED_S)
    assert not seen.faults, report(seen, SETTLED_S)
    assert seen.free_share == 1.0
    assert seen.death_told_s < 2.0
    # The run met what it is there for.
    assert seen.outcomes["answered"] > 50
    assert seen.outcomes["left by the client"] > 5
    assert seen.outcomes["broken off by the client"] > 0
    assert seen.outcomes["400 invalid_request_error"] > 5
    assert seen.outcomes["503 service_unavailable"] > 5
    assert seen.num_preemptions > 0
