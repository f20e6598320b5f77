"""One request alone: how fast its prompt is read and its tokens come. It knows neither flags nor output formats."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from lmdeploy.bench.timeline import Timeline, random_prompt, run_requests
from lmdeploy.engine.client import EngineClient

Tell = Callable[[str], None]


@dataclass(frozen=True)
class LatencyFigures:
    """Medians over the repeats. ttft_s: time to first token; token_s: between two tokens, median and 99th percentile."""

    prefill_tok_s: float
    ttft_s: float
    decode_tok_s: float
    token_p50_s: float
    token_p99_s: float


def measure_latency(
    client: EngineClient, prompt_tokens: int, output_tokens: int, repeats: int, tell: Tell
) -> LatencyFigures:
    """Run `repeats` different random prompts one after the other, after one that warms up."""
    generator = random.Random(0)
    runs: list[Timeline] = []
    for number in range(repeats + 1):
        prompt = random_prompt(prompt_tokens, client.info.vocab_size, generator)
        (run,) = run_requests(client, [prompt], output_tokens)
        if number == 0:
            continue
        runs.append(run)
        tell(
            f"one request {number}/{repeats}: prefill {prefill_rate(run):.1f} tok/s, decode {decode_rate(run):.1f} tok/s"
        )
    gaps = sorted(gap for run in runs for gap in token_gaps(run))
    return LatencyFigures(
        prefill_tok_s=statistics.median(map(prefill_rate, runs)),
        ttft_s=statistics.median(run.ttft_s for run in runs),
        decode_tok_s=statistics.median(map(decode_rate, runs)),
        token_p50_s=statistics.median(gaps),
        token_p99_s=gaps[int(0.99 * (len(gaps) - 1))],
    )


def prefill_rate(run: Timeline) -> float:
    """Prompt tokens per second until the first token, its sampling included."""
    return run.prompt_tokens / run.ttft_s


def decode_rate(run: Timeline) -> float:
    """Tokens per second after the first delivery."""
    return run.tokens_between(run.first, run.last) / (run.last - run.first)


def token_gaps(run: Timeline) -> list[float]:
    """Seconds between deliveries."""
    times = [when for when, _ in run.deliveries]
    return [after - before for before, after in pairwise(times)]
