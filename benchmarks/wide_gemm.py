"""The GPU's products of up to 64 tokens over 4-bit weights by wgmma: timed beside what else could run, and tuned.

    python -m benchmarks.wide_gemm --out FOLDER [--tune]

Times are replays of CUDA graphs over weights that exceed the L2 cache, in microseconds. The floor is the larger of two
times: the weight's bytes at the bandwidth that a large read reaches here, and its arithmetic at what a large product
reaches. `--tune` tries every tiling that fits with 64 tokens and writes FOLDER/wide_tilings.json in the form of
lmdeploy/kernels/cuda/wide_tilings_*.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.skinny_gemm import DEVICE, SHAPES, graph_time_us, make_weight
from lmdeploy.bench.roofline import measure_read_bandwidth
from lmdeploy.kernels import gated_activation
from lmdeploy.kernels.cuda import nvrtc, skinny_gemm, wide_gemm
from lmdeploy.kernels.cuda.skinny_gemm import Weight
from lmdeploy.kernels.cuda.wide_gemm import Tiling

TOKENS = (16, 32, 64)
_ROTATED_BYTES = 160 << 20


class Case:
    """One shape, with weights enough to exceed the L2 cache, and a number of tokens."""

    def __init__(self, shape: tuple[int, int, int], m: int) -> None:
        self.n, self.k, self.m, self.is_gated = shape[0], shape[1], m, bool(shape[2])
        first, _ = make_weight(self.n, self.k)
        count = max(2, -(-_ROTATED_BYTES // first.data.nbytes))
        self.weights = [first] + [Weight(first.data.clone(), self.n, self.k) for _ in range(count - 1)]
        self.x = torch.randn(m, self.k, device=DEVICE).bfloat16()
        residual = torch.zeros(m, self.n, device=DEVICE).bfloat16() if self.n in (4096, 1536) else None
        self.more = {
            "bias": torch.randn(self.n, device=DEVICE).bfloat16() if self.n == 2048 else None,
            "residual": residual,
            "out": residual,
            "activation": "silu" if self.is_gated else None,
        }

    @property
    def name(self) -> str:
        return f"{self.n}x{self.k}" + (":gated" if self.is_gated else "")

    def wide(self, w: Weight, tiling: Tiling | None = None) -> Tensor:
        return wide_gemm.wide_gemm(self.x, w, tiling=tiling, **self.more)

    def skinny(self, w: Weight) -> Tensor:
        return skinny_gemm.skinny_gemm(self.x, w, **self.more)

    def time(self, product: Callable[[Weight], object]) -> float:
        return graph_time_us(lambda: [product(w) for w in self.weights] and None, len(self.weights))

    def time_copy(self) -> float:
        """cuBLAS over 16-bit copies, and the gated activation behind it."""
        copies = [skinny_gemm.dequantize(w, torch.bfloat16) for w in self.weights[:4]]

        def work() -> None:
            for copy in copies:
                if self.more["residual"] is not None:
                    self.more["residual"].addmm_(self.x, copy.T)
                elif self.is_gated:
                    gated_activation(self.x @ copy.T, "silu")
                else:
                    F.linear(self.x, copy, self.more["bias"])

        return graph_time_us(work, len(copies))

    def tune(self) -> tuple[float, Tiling]:
        """The shortest time, and its tiling."""
        num_sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
        tried = list(wide_gemm.tilings(self.n, self.k, self.weights[0].unit_bytes, self.is_gated, num_sms))
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(self._compile, tried))
        times = [(self.time(lambda w, t=tiling: self.wide(w, t)), number) for number, tiling in enumerate(tried)]
        shortest, number = min(times)
        return shortest, tried[number]

    def _compile(self, tiling: Tiling) -> None:
        epilogue = 2 if self.is_gated else int(self.more["residual"] is not None)
        variant = wide_gemm.choose_variant(
            self.weights[0], wide_gemm.tokens_of(self.m), torch.bfloat16, epilogue, self.more["activation"],
            self.more["bias"] is not None, out_float=False, tiling=tiling,
        )  # fmt: skip
        nvrtc.cubin("wide_gemm.cu", variant.macros(), "sm_90a")


def measure_flops() -> float:
    """Of a large product of 16-bit matrices, per second."""
    a = torch.randn(8192, 8192, device=DEVICE).bfloat16()
    return 2 * 8192**3 / (graph_time_us(lambda: [a @ a for _ in range(4)] and None, 4) * 1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    args = parser.parse_args()
    bandwidth, flops = measure_read_bandwidth(DEVICE), measure_flops()
    rows, tilings = [], {}
    for shape in SHAPES:
        for m in args.tokens:
            case = Case(shape, m)
            data = case.weights[0].data
            row = {"n": case.n, "k": case.k, "m": m, "wide": case.time(case.wide), "skinny": case.time(case.skinny)}
            row["cublas_on_copy"] = case.time_copy()
            row["floor"] = 1e6 * max(data.nbytes / bandwidth, 2 * m * case.n * case.k / flops)
            if args.tune and m == wide_gemm.MAX_TOKENS:
                row["tuned"], tiling = case.tune()
                tilings[case.name] = list(vars(tiling).values())
            rows.append(row)
            print(" ".join(f"{key} {value:.1f}" if value % 1 else f"{key} {value:.0f}" for key, value in row.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "wide_gemm.json").write_text(json.dumps({"bandwidth": bandwidth, "flops": flops, "rows": rows}))
    if args.tune:
        body = ",\n".join(f' "{name}": {json.dumps(values)}' for name, values in tilings.items())
        (args.out / "wide_tilings.json").write_text("{\n" + body + "\n}\n")


if __name__ == "__main__":
    main()
