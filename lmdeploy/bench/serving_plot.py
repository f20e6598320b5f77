"""A picture of a load: how each latency is spread, one line a server. It knows only samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lmdeploy.bench.serving_figures import LATENCIES, PERCENTS, percentile

_TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between pieces of text",
    "e2e": "whole request",
}


def plot_latencies(servers: Mapping[str, Mapping[str, Sequence[float]]], title: str, file: Path) -> bool:
    """Draw the share of requests within each time; servers: label -> latency -> seconds. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    for axes, name in zip(figure.subplots(2, 2).flat, LATENCIES, strict=True):
        for label, samples in servers.items():
            values = sorted(samples[name])
            if values:
                shares = [(rank + 1) / len(values) for rank in range(len(values))]
                marks = ", ".join(f"{percentile(values, percent) * 1e3:.4g}" for percent in PERCENTS)
                axes.step([value * 1e3 for value in values], shares, where="post", label=f"{label}: {marks}")
        axes.set(title=f"{name.upper()}: {_TITLES[name]}", xlabel="ms", ylabel="share", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(title="p50, p90, p99 in ms", fontsize="small", title_fontsize="small", loc="lower right")
    figure.savefig(file, dpi=110)
    return True
