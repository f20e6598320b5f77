"""One decode step of a model of random weights in its CUDA graph: how long it takes, and where.

    python -m benchmarks.decode_step qwen2.5-1.5b --quant awq --kv 4 --batch 1 64 --context 640

The step's time is the median of some rows of replays, without a profiler. Below it, per kernel: launches, mean time and share
of the step; `before` is the mean time between the end of whatever ran before and its start, negative where the two overlap.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import defaultdict
from statistics import mean, median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import Limits, elapsed_us
from lmdeploy.bench.roofline import decode_floor
from lmdeploy.bench.shapes import shape_folder, shape_overrides
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.engine.graphs import Graph
from lmdeploy.messages import QuantPolicy

REPLAYS, PROFILED = 8, 3


def graph_of(engine: Engine, size: int, context: int) -> Graph:
    """The graph of `size` requests of `context` tokens, each on blocks of its own."""
    graphs, slots = engine.runner.graphs, engine.runner.slots
    assert graphs is not None
    if (size, False) not in graphs.graphs:
        graphs.capture(size, keeps_logits=False)
    blocks = -(-context // engine.runner.kv_cache.block_size)
    slots.tables[:size, :blocks] = torch.arange(size * blocks, device=slots.tables.device).view(size, blocks)
    rows = graphs.stage(size)
    for line in range(size):
        rows[line] = (line, context, -1, 1, context)
    graph = graphs.graphs[size, False]
    graphs.replay(size, graph)
    torch.cuda.synchronize()
    return graph


def kernel_table(graph: Graph, us: float) -> str:
    """Kernels by their time in a step."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            graph.replay()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events)
    lasted: dict[str, list[float]] = defaultdict(list)
    before: dict[str, list[float]] = defaultdict(list)
    last = spans[0][0]
    for start, end, name in spans:
        lasted[name].append(end - start)
        before[name].append(start - last)
        last = max(last, end)
    lines = []
    for name in sorted(lasted, key=lambda name: -sum(lasted[name]) - sum(before[name])):
        share = (sum(lasted[name]) + sum(before[name])) / PROFILED / us
        short = re.sub(r"^void |<.*|\(.*", "", name)[:40]
        lines.append(
            f"  {short:40s} {len(lasted[name]) / PROFILED:6.1f} x {mean(lasted[name]):8.2f} us, "
            f"before {mean(before[name]):6.2f} us, {share:6.1%}"
        )
    return "\n".join(lines[:14])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--quant", choices=["awq"])
    parser.add_argument("--kv", type=int, default=0, help="quant_policy: 0, 8, 4")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=640)
    parser.add_argument("--no-table", action="store_true", help="the step's time alone")
    options = parser.parse_args()
    begun = time.perf_counter()
    policy = QuantPolicy(options.kv)
    config = EngineConfig(
        empty_init=True,
        session_len=8192,
        max_batch_size=max(options.batch),
        quant_policy=policy,
        hf_overrides=shape_overrides(options.quant),
    )
    engine = Engine(shape_folder(options.shape), config)
    limits = Limits.measure()
    floor = decode_floor(engine.model_config, engine.info, policy, limits.bandwidth, limits.flops)
    layers = engine.model_config.num_layers
    try:
        for size in options.batch:
            graph = graph_of(engine, size, options.context)
            us = median(elapsed_us(graph.replay, REPLAYS) for _ in range(5))
            rate, limit = size / us * 1e6, floor.tokens_per_s(size, options.context)
            print(
                f"{options.shape} {options.quant or 'bf16'} kv {options.kv or 16} B={size}: {us:.1f} us a step, "
                f"{us / layers:.2f} a layer, {rate:,.0f} tok/s, floor {limit:,.0f} ({rate / limit:.1%})",
                flush=True,
            )
            if not options.no_table:
                print(kernel_table(graph, us), flush=True)
    finally:
        engine.close()
    print(f"  {time.perf_counter() - begun:.1f} s")


if __name__ == "__main__":
    main()
