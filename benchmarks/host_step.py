"""What the host does in a decode step, with a device that costs nothing; it needs no GPU.

    python -m benchmarks.host_step --batch 1 64 256

A tiny model with random weights takes the prompts; then every decode step is a graph whose tokens are there at once. Printed
are the least and the median time of a step over rounds of 64, in which every request gets one more block: of the engine
alone, and of the whole loop with each token handed to its receiver.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from lmdeploy.bench.shapes import SHAPES
from lmdeploy.engine.client import Deliveries
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.engine.graphs import DecodeGraphs, Graph
from lmdeploy.engine.request import Request, RequestOutput, SamplingParams

ROUND = 64
TINY = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


class FreeGraphs(DecodeGraphs):
    """Graphs that leave token 5."""

    def capture(self, size: int, keeps_hidden: bool) -> None:
        self.graphs[size, keeps_hidden] = Graph(lambda: None, torch.full((size,), 5))


def make_engine(batch_size: int, rounds: int) -> Engine:
    with tempfile.TemporaryDirectory() as folder:
        config = {**SHAPES["qwen2.5-1.5b"], **TINY, "intermediate_size": 64, "vocab_size": 512}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        blocks = batch_size * (rounds + 2)
        engine = Engine(
            Path(folder),
            EngineConfig(
                device="cpu", dtype="float32", empty_init=True, session_len=ROUND * (rounds + 1), max_batch_size=batch_size,
                cache_max_entry_count=blocks, max_steps_in_flight=2,
            ),
        )  # fmt: skip
    runner = engine.runner
    runner.graphs = FreeGraphs(runner.model, runner.kv_cache, runner.slots, None, batch_size)
    for key in runner.graphs.missing():
        runner.graphs.capture(*key)
    return engine


def us_per_step(step: Callable[[], object], rounds: int) -> str:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(ROUND):
            step()
        times.append((time.perf_counter() - started) / ROUND * 1e6)
    return f"{min(times):.0f} us, median {median(times):.0f}"


def measure(batch_size: int, rounds: int) -> None:
    engine = make_engine(batch_size, 2 * rounds + 1)
    deliveries = Deliveries(lambda request_id: None)
    received: deque[RequestOutput] = deque(maxlen=1)
    for number in range(batch_size):
        prompt = [1] * (1 + number % ROUND)  # so that blocks are needed at different steps
        request = Request(f"{number:032x}", prompt, SamplingParams(max_new_tokens=1 << 20, stop_token_ids=(2,)))
        deliveries.register(request, received.append)
        engine.add(request)
    decoding: set[str] = set()
    while len(decoding) < batch_size:
        decoding.update(output.request_id for output in engine.step())
    alone = us_per_step(engine.step, rounds)
    delivered = us_per_step(lambda: deliveries.publish(engine.step()), rounds)
    print(f"B={batch_size}: step {alone}; with delivery {delivered}", flush=True)
    engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for batch_size in args.batch:
        measure(batch_size, args.rounds)


if __name__ == "__main__":
    main()
