"""Many requests together: what the engine yields in all. It knows neither flags nor output formats."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass

from lmdeploy.bench.latency import Tell
from lmdeploy.bench.timeline import Timeline, random_prompt, run_requests
from lmdeploy.engine.client import EngineClient


@dataclass(frozen=True)
class ThroughputFigures:
    """Medians over the repeats, tokens per second.

    batch_tok_s: output tokens while every request of the batch decodes. output_tok_s, total_tok_s: output tokens, and
    output and prompt tokens, over the whole run, prefill included.
    """

    batch_tok_s: float
    output_tok_s: float
    total_tok_s: float
    batch_ttft_s: float


def measure_throughput(
    client: EngineClient,
    prompt_tokens: int,
    output_tokens: int,
    repeats: int,
    tell: Tell,
    *,
    batch_size: int,
) -> ThroughputFigures:
    """Run batches of `batch_size` different random prompts, all submitted at once, after one that warms up."""
    generator = random.Random(1)
    runs: list[list[Timeline]] = []
    for number in range(repeats + 1):
        prompts = [random_prompt(prompt_tokens, client.info.vocab_size, generator) for _ in range(batch_size)]
        batch = run_requests(client, prompts, output_tokens)
        if number == 0:
            continue
        runs.append(batch)
        tell(
            f"batch of {batch_size} {number}/{repeats}: decode {steady_rate(batch):.1f} tok/s, "
            f"whole run {output_tokens * batch_size / duration(batch):.1f} tok/s"
        )
    output_rate = statistics.median(output_tokens * batch_size / duration(batch) for batch in runs)
    return ThroughputFigures(
        batch_tok_s=statistics.median(map(steady_rate, runs)),
        output_tok_s=output_rate,
        total_tok_s=output_rate * (prompt_tokens + output_tokens) / output_tokens,
        batch_ttft_s=statistics.median(run.ttft_s for batch in runs for run in batch),
    )


def steady_rate(batch: list[Timeline]) -> float:
    """Tokens per second from the last request's first token to the first request's last.

    Falls back to the whole time of decoding where requests do not overlap, as when the engine's batch is smaller.
    """
    start, end = max(run.first for run in batch), min(run.last for run in batch)
    if end <= start:
        start, end = min(run.first for run in batch), max(run.last for run in batch)
    return sum(run.tokens_between(start, end) for run in batch) / (end - start)


def duration(batch: list[Timeline]) -> float:
    """Seconds from the first submission to the last token."""
    return max(run.last for run in batch) - min(run.submitted for run in batch)
