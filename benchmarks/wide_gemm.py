"""The GPU's products of up to 64 tokens over 4-bit weights by wgmma: timed beside what else could run, and tuned.

    python -m benchmarks.wide_gemm --out FOLDER [--tune]

Times are replays of CUDA graphs over weights that exceed the L2 cache, floors those of benchmarks/gpu.py, in microseconds.
`--tune` tries every tiling that fits with 64 tokens and writes FOLDER/wide_tilings.json in the form of
lmdeploy/kernels/cuda/wide_tilings_*.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import DEVICE, Limits, compile_all, replay_us, show, write, write_tilings
from benchmarks.skinny_gemm import SHAPES, floor_us, make_weights
from lmdeploy.kernels import gated_activation
from lmdeploy.kernels.cuda import skinny_gemm, wide_gemm
from lmdeploy.kernels.cuda.epilogue import GATED, Epilogue
from lmdeploy.kernels.cuda.skinny_gemm import Weight
from lmdeploy.kernels.cuda.wide_gemm import Tiling

TOKENS = (16, 32, 64)


class Case:
    """One shape, with weights enough to exceed the L2 cache, and a number of tokens."""

    def __init__(self, shape: tuple[int, int, int], m: int) -> None:
        self.n, self.k, self.m, self.is_gated = shape[0], shape[1], m, bool(shape[2])
        self.weights = make_weights(self.n, self.k)
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
        return replay_us([lambda w=w: product(w) for w in self.weights])

    def time_copy(self) -> float:
        """cuBLAS over 16-bit copies, and the gated activation behind it."""
        copies = [skinny_gemm.dequantize(w, torch.bfloat16) for w in self.weights[:4]]

        def product(copy: Tensor) -> Tensor:
            if self.more["residual"] is not None:
                return self.more["residual"].addmm_(self.x, copy.T)
            return (
                gated_activation(self.x @ copy.T, "silu")
                if self.is_gated
                else F.linear(self.x, copy, self.more["bias"])
            )

        return replay_us([lambda copy=copy: product(copy) for copy in copies])

    def tune(self) -> tuple[float, Tiling]:
        """The shortest time, and its tiling."""
        unit_bytes, num_sms = self.weights[0].unit_bytes, skinny_gemm.num_sms()
        tried = list(wide_gemm.tilings(self.n, self.k, unit_bytes, self.is_gated, num_sms))
        compile_all("wide_gemm.cu", map(self._macros, tried))
        times = [(self.time(lambda w, t=tiling: self.wide(w, t)), number) for number, tiling in enumerate(tried)]
        shortest, number = min(times)
        return shortest, tried[number]

    def _macros(self, tiling: Tiling) -> dict[str, object]:
        kind = GATED if self.is_gated else int(self.more["residual"] is not None)
        epilogue = Epilogue(is_half=False, out_float=False, kind=kind, has_bias=self.more["bias"] is not None)
        return wide_gemm.choose_variant(self.weights[0], epilogue, tiling).macros()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    args = parser.parse_args()
    limits = Limits.measure()
    rows, tilings = [], {}
    for shape in SHAPES:
        for m in args.tokens:
            case = Case(shape, m)
            row = {"n": case.n, "k": case.k, "m": m, "wide": case.time(case.wide), "skinny": case.time(case.skinny)}
            row["cublas_on_copy"] = case.time_copy()
            row["floor"] = floor_us(case.weights[0], m, limits)
            if args.tune and m == wide_gemm.MAX_TOKENS:
                row["tuned"], tiling = case.tune()
                tilings[case.name] = list(vars(tiling).values())
            rows.append(row)
            show(row)
    write(args.out / "wide_gemm.json", limits, rows)
    if args.tune:
        write_tilings(args.out / "wide_tilings.json", tilings)


if __name__ == "__main__":
    main()
