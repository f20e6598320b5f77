"""The GPU's products of 65 to 256 tokens over 16-bit weights: checked against float64, timed beside what else could run, tuned.

    python -m benchmarks.batch_gemm --out FOLDER [--checks N] [--tokens M ...] [--tune TILINGS]

Times are replays of CUDA graphs over weights that exceed the L2 cache, floors those of benchmarks/gpu.py, in microseconds.
`--tune` times that many tilings of each shape, the best by a model of the hardware, and writes FOLDER/batch_tilings.json in the
form of lmdeploy/kernels/cuda/batch_tilings_*.json: shapes for which one of them was faster than everything else.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.dense_gemm import HEADS, LAYERS, Shape, library, make_weight, multiply
from benchmarks.gpu import DEVICE, Limits, compile_all, copies_for, guarded, replays_us, show, write, write_tilings
from lmdeploy.kernels.cuda import batch_gemm
from lmdeploy.kernels.cuda.batch_gemm import Tiling, Variant
from lmdeploy.kernels.cuda.epilogue import ACTIVATIONS, GATED, NOTHING, RESIDUAL, Epilogue
from lmdeploy.kernels.reference.basic import gated_activation

_PER_FORM = 3  # tilings that differ in nothing but their rows
_GAIN = 0.98  # of the time of what else there is, for a tiling to be taken


@dataclass(frozen=True)
class Check:
    """A random product and tiling."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    epilogue: Epilogue
    tiling: Tiling

    @classmethod
    def draw(cls, number: int) -> Check:
        """The same for a number every time."""
        draw = random.Random(number)
        kind = draw.choice((NOTHING, RESIDUAL, GATED))
        n, k = 16 * draw.choice((8, 45, 100, 257)), draw.choice((264, 1536, 2056, 4096))
        n, tokens = n - draw.choice((0, 8)) * (kind != GATED), draw.choice(batch_gemm.TOKEN_TILES)
        tiling = draw.choice(list(batch_gemm.tilings(n, k, tokens, kind == GATED)))
        is_half = draw.random() < 0.3
        epilogue = Epilogue(is_half, draw.random() < 0.3, kind, draw.randrange(3), draw.random() < 0.4)
        dtype = torch.float16 if is_half else torch.bfloat16
        return cls(draw.randint(tokens - 63, tokens), n, k, dtype, epilogue, tiling)

    @property
    def variant(self) -> Variant:
        """What it launches."""
        return Variant(self.epilogue, self.tiling)

    def run(self) -> float:
        """The relative error by norm. Raises AssertionError on what is wrong."""
        torch.manual_seed(self.m + self.n)
        m, n, k, end = self.m, self.n, self.k, self.epilogue
        weight, bias = (torch.randn(n, k, device=DEVICE) * k**-0.5).to(self.dtype), torch.randn(n, device=DEVICE)
        x = torch.randn(m, k + 8, device=DEVICE).to(self.dtype)[:, :k]
        bias = bias.to(self.dtype) if end.has_bias else None
        residual = torch.randn(m, n, device=DEVICE).to(self.dtype) if end.has_residual else None
        activation = ACTIVATIONS[end.activation] if end.is_gated else None
        expected = x.double() @ weight.double().T
        expected = expected if bias is None else expected + bias.double()
        expected = gated_activation(expected, activation) if activation else expected
        expected = expected if residual is None else expected + residual.double()

        def launch(out: Tensor, rows: slice = slice(None)) -> Tensor:
            addend = None if residual is None else residual[rows]
            return batch_gemm.batch_gemm(
                x[rows], weight, self.tiling, bias=bias, residual=addend, activation=activation, out=out
            )

        out_dtype = torch.float32 if end.out_float else self.dtype
        outs = [guarded(expected.shape, out_dtype, launch) for _ in range(3)]
        assert all(torch.equal(outs[0], out) for out in outs[1:]), f"not deterministic: {self}"
        alone = launch(torch.empty_like(outs[0][:1]), slice(m // 2, m // 2 + 1))
        assert torch.equal(alone, outs[0][m // 2 : m // 2 + 1]), f"a row depends on the others: {self}"
        error = ((outs[0].double() - expected).norm() / expected.norm()).item()
        assert error < 1e-2, f"error {error:.2e}: {self}"
        return error


def compile_variants(variants: Iterable[Variant]) -> None:
    """Into the cache, in parallel."""
    compile_all("batch_gemm.cu", [variant.macros() for variant in variants])


def epilogue_of(shape: Shape) -> Epilogue:
    """Of the product as a layer runs it."""
    kind = GATED if shape.is_gated else RESIDUAL if shape.has_residual else NOTHING
    return Epilogue(is_half=False, out_float=shape.is_wide, kind=kind)


def candidates(shape: Shape, tokens: int, count: int) -> list[Tiling]:
    """The best by the model, few of each form."""
    num_sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count if torch.cuda.is_available() else 132
    tried = batch_gemm.tilings(shape.n, shape.k, tokens, shape.is_gated)
    ordered = sorted(tried, key=lambda t: batch_gemm.cost(t, shape.n, shape.k, shape.is_gated, num_sms))
    forms: dict[tuple[int, ...], int] = {}
    found = []
    for tiling in ordered:
        form = astuple(tiling)[1:-1]
        forms[form] = forms.get(form, 0) + 1
        if forms[form] <= _PER_FORM:
            found.append(tiling)
    return found[:count]


class Case:
    """One shape, with weights enough to exceed the L2 cache, and a number of tokens."""

    def __init__(self, shape: Shape, m: int) -> None:
        self.shape, self.m = shape, m
        first = make_weight(shape)
        self.weights = [first] + [first.clone() for _ in range(copies_for(shape.num_bytes) - 1)]
        self.x, self.gamma = (
            torch.randn(m, shape.k, device=DEVICE).bfloat16(),
            torch.ones(shape.k, device=DEVICE).bfloat16(),
        )
        outs = shape.n // 2 if shape.is_gated else shape.n
        self.out = torch.zeros(m, outs, device=DEVICE, dtype=torch.float32 if shape.is_wide else torch.bfloat16)

    @property
    def name(self) -> str:
        """Of its line in the table."""
        tokens = next(tile for tile in batch_gemm.TOKEN_TILES if tile >= self.m)
        return f"{self.shape.n}x{self.shape.k}{':gated' if self.shape.is_gated else ''}:{tokens}"

    def here(self, tiling: Tiling, weight: Tensor) -> Tensor:
        """By the kernel."""
        return batch_gemm.batch_gemm(
            self.x, weight, tiling, out=self.out, residual=self.out if self.shape.has_residual else None,
            activation="silu" if self.shape.is_gated else None,
        )  # fmt: skip

    def times(self, tilings: Iterable[Tiling]) -> dict[str, float]:
        """Microseconds of cuBLAS, of what runs today ("now"), and by each of the tilings, in random turns."""
        shape, x, out = self.shape, self.x, self.out
        products: dict[str, Callable[[Tensor], object]] = {
            "cublas": lambda w: library(shape, x, w, out),
            "now": lambda w: multiply(shape, x, w, self.gamma, out),
        }
        products.update({spell(t): lambda w, t=t: self.here(t, w) for t in tilings})
        return replays_us({name: [lambda w=w, p=p: p(w) for w in self.weights] for name, p in products.items()})


def spell(tiling: Tiling) -> str:
    """Its numbers, as in the table."""
    return ",".join(map(str, astuple(tiling)))


def best_of(times: dict[str, float]) -> list[int] | None:
    """The line of the table: the fastest tiling, if it is faster than what else there is."""
    name = min((name for name in times if "," in name), key=lambda name: times[name])
    return [int(part) for part in name.split(",")] if times[name] < _GAIN * min(times["cublas"], times["now"]) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checks", type=int, default=40)
    parser.add_argument("--tokens", type=int, nargs="*", default=batch_gemm.TOKEN_TILES)
    parser.add_argument("--tune", type=int, default=0)
    args = parser.parse_args()
    limits = Limits.measure()
    checks = [Check.draw(number) for number in range(args.checks)]
    compile_variants(check.variant for check in checks)
    print(f"{args.checks} checks fine, worst error {max((check.run() for check in checks), default=0.0):.1e}")
    rows, table = [], {}
    for shape in [*(shape for shapes, _ in LAYERS.values() for shape in shapes), *HEADS]:
        for m in args.tokens:
            case = Case(shape, m)
            tried = candidates(shape, int(case.name.rpartition(":")[2]), args.tune)
            compile_variants(Variant(epilogue_of(shape), tiling) for tiling in tried)
            times = case.times(tried)
            found = best_of(times) if tried else None
            if found is not None:
                table[case.name] = found
            rows.append({"name": case.name, "m": m, "floor": shape.floor_us(m, limits), **times, "best": str(found)})
            show(rows[-1])
    write(args.out / "batch_gemm.json", limits, rows)
    if args.tune:
        write_tilings(args.out / "batch_tilings.json", table)


if __name__ == "__main__":
    main()
