"""`benchmarks/serve_overhead.py` measures what it says, on a tiny model; its figures are too noisy here to be judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SMALL = ("--streams", "4", "--prompt-tokens", "8", "--output-tokens", "12", "--repeats", "2", "--dtype", "float32")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_benchmark_of_the_overhead(tiny: Path) -> None:
    command = [sys.executable, "benchmarks/serve_overhead.py", str(tiny), "--json", *SMALL]
    answer = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=50, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert found["pipeline_tok_s"] > 0
    assert found["ratio_of_medians"] == pytest.approx(found["server_tok_s"] / found["pipeline_tok_s"], abs=0.01)
    assert len(found["ratios"]) == found["repeats"] == 2
    assert found["health_p50_ms"] <= found["health_p99_ms"]
    assert found["health_asked"] >= 2
    assert "2/2: pipeline" in answer.stderr
