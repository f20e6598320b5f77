"""What the benchmarks of GPU kernels share: replays of CUDA graphs by the clock, the card's limits, buffers between poison.

It knows no kernel.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lmdeploy.bench.roofline import measure_read_bandwidth
from lmdeploy.kernels.cuda.nvrtc import KernelError, cubin
from lmdeploy.kernels.cuda.skinny_gemm import arch

DEVICE = torch.device("cuda")
ROTATED_BYTES = 256 << 20  # several times what a second-level cache holds
CALLS = 10  # in a graph, at least

Call = Callable[[], object]


@dataclass(frozen=True)
class Limits:
    """Bytes per second of a large read, and operations per second of a large product of bfloat16, as measured here."""

    bandwidth: float
    flops: float

    @classmethod
    def measure(cls) -> Limits:
        """Both, on this card."""
        a, b = torch.randn(2, 8192, 8192, device=DEVICE).bfloat16()
        return cls(measure_read_bandwidth(DEVICE), 2e6 * 8192**3 / replay_us([lambda: a @ b]))

    def floor_us(self, num_bytes: float, flops: float = 0.0) -> float:
        """What reading so much, or computing so much, takes at least."""
        return 1e6 * max(num_bytes / self.bandwidth, flops / self.flops)


def elapsed_us(work: Call, times: int = 1) -> float:
    """Microseconds that the device takes for what work launches, on average over so many times in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / times


def replay_us(calls: Sequence[Call], replays: int = 9) -> float:
    """Median microseconds of one of the calls, in replays of a graph of them all; give each a buffer of its own."""
    return replays_us({"": calls}, replays)[""]


def replays_us(kernels: Mapping[str, Sequence[Call]], replays: int = 9) -> dict[str, float]:
    """The same for several kernels in random turns: under load the card lowers its clock, and the first would look better."""
    graphs = {name: _capture(calls) for name, calls in kernels.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(replays):
        for name in random.Random(turn).sample(list(graphs), len(graphs)):
            graph, count = graphs[name]
            samples[name].append(elapsed_us(graph.replay) / count)
    return {name: median(times) for name, times in samples.items()}


def _capture(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph that has run once, and how many calls are in it."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = -(-CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    with torch.cuda.graph(graph, stream=None if stream == torch.cuda.default_stream() else stream):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    return graph, rounds * len(calls)


def compile_all(source: str, variants: Iterable[Mapping[str, object]]) -> list[bool]:
    """Compile a file of lmdeploy/kernels/cuda with each set of macros, all at once; whether it compiles."""

    def compiles(macros: Mapping[str, object]) -> bool:
        try:
            return bool(cubin(source, macros, arch()))
        except KernelError:
            return False

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(compiles, variants))


def copies_for(num_bytes: float, most: int = 256) -> int:
    """How many buffers of this size no cache holds."""
    return max(1, min(most, int(-(-ROTATED_BYTES // num_bytes))))


def run_checks(check: Callable[[int], float], count: int) -> None:
    """So many random cases at once, since most of their time they compile; says the worst error. Raises AssertionError."""
    with ThreadPoolExecutor(16) as pool:
        worst = max(pool.map(check, range(count)), default=0.0)
    print(f"{count} checks fine, worst error {worst:.1e}", flush=True)


def guarded(shape: Sequence[int], dtype: torch.dtype, launch: Callable[[Tensor], object]) -> Tensor:
    """What launch writes to a tensor [M, N] between two rows of poison, which must stay: AssertionError."""
    out = torch.full((shape[0] + 2, shape[1]), float("nan"), device=DEVICE, dtype=dtype)
    launch(out[1:-1])
    torch.cuda.synchronize()
    assert out[0].isnan().all(), "wrote before the result"
    assert out[-1].isnan().all(), "wrote behind the result"
    return out[1:-1]


def show(row: Mapping[str, Any]) -> None:
    """One line of figures."""
    print(" ".join(f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


def write(path: Path | None, limits: Limits, rows: Iterable[Mapping[str, Any]], **more: object) -> None:
    """All figures as JSON, if there is a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"device": torch.cuda.get_device_name(), **asdict(limits), **more, "rows": list(rows)}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write_tilings(path: Path, tilings: Mapping[str, Sequence[object]]) -> None:
    """In the form of lmdeploy/kernels/cuda/*tilings_*.json, a line each."""
    body = ",\n".join(f' "{name}": {json.dumps(values)}' for name, values in tilings.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + body + "\n}\n", encoding="utf-8")
