"""What a load's traces say: percentiles, rates, goodput, errors, and ratios of two servers. It knows no HTTP.

TTFT: from a request's start to its first text. TPOT: from there to its last text, by its tokens but the first. ITL: between
two pieces of text, which may bear more than one token each. E2E: from start to end. Seconds throughout.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from statistics import mean, median
from typing import Any

from lmdeploy.bench.serving_load import Run, Trace
from lmdeploy.errors import ConfigError

PERCENTS = (50, 90, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2e")
_UNITS = {"ms": 1e-3, "s": 1.0}
# Figures of a round that two servers are compared by.
COMPARED = (
    "output_tok_s", "requests_s", "goodput_s", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "itl_p99_s",
    "e2e_p50_s", "e2e_p99_s",
)  # fmt: skip


def parse_slo(text: str) -> dict[str, float]:
    """`ttft=200ms,tpot=0.05s` as limits in seconds. Raises ConfigError."""
    limits = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", value.strip())
        if name not in ("ttft", "tpot", "e2e") or found is None:
            raise ConfigError(f"--slo {part.strip()!r}: write for example ttft=500ms,tpot=0.05s,e2e=10s")
        limits[name] = float(found[1]) * _UNITS[found[2]]
    return limits


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of a hundred are no larger than (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(math.ceil(percent / 100 * len(ordered)) - 1, 0)]


def latencies(trace: Trace) -> dict[str, float]:
    """A request's own ttft, tpot and e2e; tpot only where more than one token came in more than one piece."""
    found = {"e2e": trace.ended - trace.due}
    if trace.arrivals:
        found["ttft"] = trace.arrivals[0] - trace.due
    if len(trace.arrivals) > 1 and trace.output_tokens > 1:
        found["tpot"] = (trace.arrivals[-1] - trace.arrivals[0]) / (trace.output_tokens - 1)
    return found


def keeps(trace: Trace, slo: dict[str, float]) -> bool:
    """Whether an answer came, and within every limit; of a limit that does not apply to it, it is within."""
    found = latencies(trace)
    return trace.error is None and all(found.get(name, 0.0) <= limit for name, limit in slo.items())


def summarize(runs: Sequence[Run], slo: dict[str, float] | None = None) -> dict[str, Any]:
    """The figures of all requests of some runs, flat: times end in _s, as do rates per second."""
    traces = [trace for run in runs for trace in run.traces]
    good = [trace for trace in traces if trace.error is None]
    duration = sum(run.duration_s for run in runs)
    figures: dict[str, Any] = {
        "requests": len(traces),
        "completed": len(good),
        "errors": dict(Counter(trace.error for trace in traces if trace.error is not None).most_common()),
        "duration_s": duration,
        "requests_s": len(good) / duration,
        "prompt_tokens": sum(trace.prompt_tokens for trace in good),
        "output_tokens": sum(trace.output_tokens for trace in good),
        "output_tok_s": sum(trace.output_tokens for trace in good) / duration,
        "total_tok_s": sum(trace.output_tokens + trace.prompt_tokens for trace in good) / duration,
    }
    if slo is not None:
        num_kept = sum(keeps(trace, slo) for trace in traces)
        figures |= {"slo_s": slo, "goodput_s": num_kept / duration, "slo_share": num_kept / len(traces)}
    for name, values in samples(good).items():
        if values:
            figures[f"{name}_mean_s"] = mean(values)
            figures |= {f"{name}_p{percent}_s": percentile(values, percent) for percent in PERCENTS}
    figures["client_cpu_share"] = max(run.cpu_share for run in runs)
    figures["client_late_p99_s"] = percentile([trace.sent - trace.due for trace in traces], 99)
    return figures


def samples(traces: Sequence[Trace]) -> dict[str, list[float]]:
    """All values of each latency."""
    found: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for trace in traces:
        for name, value in latencies(trace).items():
            found[name].append(value)
        found["itl"] += [after - before for before, after in pairwise(trace.arrivals)]
    return found


def compare(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each figure the ratio second / first of the medians over the rounds, and the extremes of the rounds' own ratios."""
    ratios = {}
    for name in COMPARED:
        pairs = [(a[name], b[name]) for a, b in zip(first, second, strict=True) if a.get(name) and b.get(name)]
        if pairs:
            own = [b / a for a, b in pairs]
            ratio = median(b for _, b in pairs) / median(a for a, _ in pairs)
            ratios[name] = {"ratio": ratio, "min": min(own), "max": max(own)}
    return ratios
