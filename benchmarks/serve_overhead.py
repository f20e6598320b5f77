"""What a server costs: its tokens per second against those of `pipeline` on the same work, and its /health under load.

Both run the same engine with the same settings, by turns, so many times; the server is the command's own process with the
engine in another, and every token is an event of its own to one of the streams. Prompts are random words, other ones in
each repeat, end tokens are ignored, sampling is greedy, prefix caching is off.
`python benchmarks/serve_overhead.py --json > benchmarks/results/serve_overhead_smollm2.json`
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lmdeploy import GenerationConfig, TurbomindEngineConfig, pipeline
from lmdeploy.api import Pipeline
from lmdeploy.bench.serving_figures import percentile
from lmdeploy.bench.serving_http import HttpClient
from lmdeploy.bench.serving_load import Endpoint, Run, Target, run_closed
from lmdeploy.bench.serving_prompts import Ask, random_asks
from lmdeploy.serve.launch import serve

_HEALTH_EVERY_S = 0.02


@dataclass(frozen=True)
class Turn:
    """One repeat of both: tokens per second, seconds of every /health meanwhile, CPU time of the server without its engine."""

    pipeline_tok_s: float
    server_tok_s: float
    health_s: list[float]
    server_cpu_s_per_token: float
    client_cpu_share: float


def pipeline_rate(pipe: Pipeline, asks: list[Ask], is_chat: bool) -> float:
    """Tokens per second of all prompts answered together, streamed, from the first one's start to the last one's end."""
    config = GenerationConfig(max_new_tokens=asks[0].max_tokens, ignore_eos=True, do_sample=False)
    started = time.perf_counter()
    count = 0
    for response in pipe.stream_infer([ask.text() for ask in asks], gen_config=config, do_preprocess=is_chat):
        count += len(response.token_ids)
    took = time.perf_counter() - started
    if count != sum(ask.max_tokens for ask in asks):
        raise RuntimeError(f"pipeline gave {count} tokens")
    return count / took


async def server_run(target: Target, asks: list[Ask]) -> tuple[Run, list[float]]:
    """The same from the server, and how long each /health took meanwhile."""
    waits: list[float] = []
    watcher = asyncio.ensure_future(_watch_health(target.url, waits))
    run = await run_closed(target, asks, len(asks))
    watcher.cancel()
    errors = {trace.error for trace in run.traces if trace.error is not None}
    tokens = sum(trace.output_tokens for trace in run.traces)
    if errors or tokens != sum(ask.max_tokens for ask in asks):
        raise RuntimeError(f"the server gave {tokens} tokens; errors: {errors or 'none'}")
    return run, waits


async def _watch_health(url: str, waits: list[float]) -> None:
    client = HttpClient(url)
    while True:
        asked = time.perf_counter()
        if await client.request("GET", "/health", b"", lambda data, when: None) != 200:
            raise RuntimeError("/health does not say 200")
        waits.append(time.perf_counter() - asked)
        await asyncio.sleep(_HEALTH_EVERY_S)


def cpu_seconds(process: int) -> float:
    """CPU time that a process has used so far; Linux only."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(args: argparse.Namespace) -> list[Turn]:
    config = TurbomindEngineConfig(
        session_len=4 * args.prompt_tokens + args.output_tokens + 64,
        max_batch_size=args.streams,
        enable_prefix_caching=False,
        dtype=args.dtype,
    )
    turns: list[Turn] = []
    with (
        pipeline(args.model, backend_config=config) as pipe,
        serve(args.model, "m", backend_config=config, server_port=0) as served,
    ):
        endpoint: Endpoint = args.endpoint
        target = Target(served.api_server_url, "m", endpoint, more={"ignore_eos": True, "temperature": 0})
        for number in range(args.repeats + 1):
            asks = random_asks(args.streams, args.prompt_tokens, args.output_tokens, random.Random(number))
            rates: dict[str, Any] = {}
            for side in ("pipeline", "server") if number % 2 else ("server", "pipeline"):
                if side == "pipeline":
                    rates[side] = pipeline_rate(pipe, asks, endpoint == "chat")
                else:
                    cpu = cpu_seconds(served.process.pid)
                    rates[side] = asyncio.run(server_run(target, asks))
                    cpu = cpu_seconds(served.process.pid) - cpu
            run, waits = rates["server"]
            tokens = sum(trace.output_tokens for trace in run.traces)
            turn = Turn(rates["pipeline"], tokens / run.duration_s, waits, cpu / tokens, run.cpu_share)
            print(
                f"{number}/{args.repeats}: pipeline {turn.pipeline_tok_s:.1f}, server {turn.server_tok_s:.1f} tok/s, "
                f"/health p99 {percentile(waits, 99) * 1e3:.1f} ms",
                file=sys.stderr,
            )
            turns += [turn] if number else []  # the first one warms up
    return turns


def figures(turns: list[Turn], args: argparse.Namespace) -> dict[str, Any]:
    ratios = [turn.server_tok_s / turn.pipeline_tok_s for turn in turns]
    pipe, server = (median(getattr(turn, f"{side}_tok_s") for turn in turns) for side in ("pipeline", "server"))
    waits = [wait for turn in turns for wait in turn.health_s]
    return {
        "pipeline_tok_s": round(pipe, 1),
        "server_tok_s": round(server, 1),
        "ratio_of_medians": round(server / pipe, 4),
        "median_of_ratios": round(median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "health_asked": len(waits),
        **{f"health_p{percent}_ms": round(percentile(waits, percent) * 1e3, 2) for percent in (50, 90, 99)},
        "server_cpu_us_per_token": round(median(turn.server_cpu_s_per_token for turn in turns) * 1e6),
        "client_cpu_share": round(max(turn.client_cpu_share for turn in turns), 3),
        "model": args.model or "SmolLM2-135M-Instruct, the built-in model",
        **{name: getattr(args, name) for name in ("endpoint", "streams", "prompt_tokens", "output_tokens", "repeats", "dtype")},
        "cores": os.cpu_count(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", help="a path (default: the built-in model)")
    parser.add_argument("--endpoint", choices=("chat", "completions"), default="chat")
    parser.add_argument("--dtype", default="auto")
    for name, default in (("--streams", 32), ("--prompt-tokens", 64), ("--output-tokens", 64), ("--repeats", 5)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = figures(measure(args), args)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        print(f"{name:<20} {value}")


if __name__ == "__main__":
    main()
