"""The whole measurement of one server or two: warm-up, rounds by turns, figures. It knows no flags.

Of two servers each round asks both the same, the one that begins alternating, so that what else the machine does meets
both alike.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmdeploy.bench.serving_figures import compare, samples, summarize
from lmdeploy.bench.serving_load import Run, Target, ask_server, run_closed, run_open
from lmdeploy.bench.serving_prompts import Ask
from lmdeploy.errors import ConfigError

BUSY_CLIENT = 0.7  # of a core: beyond it the figures may be those of the client
Tell = Callable[[str], None]
MakeAsks = Callable[[random.Random], list[Ask]]


@dataclass(frozen=True)
class Load:
    """rate: requests a second on average, an open loop; None is a closed loop of `concurrency` clients."""

    rate: float | None
    concurrency: int
    rounds: int = 1
    warmup: int = 1
    seed: int = 0
    slo: dict[str, float] | None = None


@dataclass(frozen=True)
class Measurement:
    """Of each server its figures over all rounds, and its latencies; of two, the ratios second / first."""

    figures: list[dict[str, Any]]
    samples: list[dict[str, list[float]]]
    ratios: dict[str, dict[str, float]] | None


async def measure(targets: Sequence[Target], make_asks: MakeAsks, load: Load, tell: Tell) -> Measurement:
    """Raises ConfigError where a server answers none of the warm-up's requests."""
    for target in targets:
        await _warm_up(target, make_asks(random.Random(load.seed - 1)), load.warmup)
    runs: list[list[Run]] = [[] for _ in targets]
    for number in range(load.rounds):
        asks = make_asks(random.Random(f"{load.seed}-{number}"))
        order = list(enumerate(targets))
        for which, target in order if number % 2 == 0 else reversed(order):
            run = await _run(target, asks, load, number)
            runs[which].append(run)
            told = summarize([run], load.slo)
            errors = f", {told['requests'] - told['completed']} failed" if told["errors"] else ""
            tell(f"round {number + 1}/{load.rounds} {target.url}: {told['output_tok_s']:.1f} tok/s{errors}")
    rounds = [[summarize([run], load.slo) for run in own] for own in runs]
    return Measurement(
        [summarize(own, load.slo) for own in runs],
        [samples([trace for run in own for trace in run.traces if trace.error is None]) for own in runs],
        compare(*rounds) if len(targets) == 2 else None,
    )


async def _run(target: Target, asks: Sequence[Ask], load: Load, number: int) -> Run:
    if load.rate is None:
        return await run_closed(target, asks, load.concurrency)
    return await run_open(target, asks, load.rate, random.Random(f"{load.seed}-{number}-times"))


async def _warm_up(target: Target, asks: Sequence[Ask], count: int) -> None:
    client = target.client()
    try:
        traces = await asyncio.gather(*(ask_server(client, target, ask) for ask in asks[:count]))
    finally:
        await client.close()
    if traces and all(trace.error is not None for trace in traces):
        raise ConfigError(f"{target.url} answers no request: {traces[0].error}")
