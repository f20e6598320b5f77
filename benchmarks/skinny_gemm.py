"""The GPU's products of few tokens with 4-bit weights: checked against float64, timed, and tuned.

    python -m benchmarks.skinny_gemm --out FOLDER [--tune SECONDS]

Times are replays of CUDA graphs over weights that exceed the L2 cache, floors those of benchmarks/gpu.py. `--tune` searches
tilings and writes FOLDER/tilings.json in the form that lmdeploy/kernels/cuda/tilings_*.json have.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import astuple
from itertools import compress
from pathlib import Path

import torch

from benchmarks.gpu import DEVICE, Limits, compile_all, copies_for, guarded, replay_us, show, write, write_tilings
from lmdeploy.kernels.cuda import skinny_gemm as sg
from lmdeploy.kernels.cuda.epilogue import ACTIVATIONS, GATED, Epilogue
from lmdeploy.kernels.cuda.nvrtc import KernelError
from lmdeploy.kernels.reference.basic import gated_activation, rms_norm
from lmdeploy.quantization.packing import AffineTensor

# (n, k, gated) of InternLM2-7B and Qwen2.5-1.5B: qkv, o, gate and up, down.
SHAPES = [(6144, 4096, 0), (4096, 4096, 0), (28672, 4096, 1), (4096, 14336, 0)]
SHAPES += [(2048, 1536, 0), (1536, 1536, 0), (17920, 1536, 1), (1536, 8960, 0)]
TOKENS = (1, 2, 4, 8, 16, 32, 64)


def make_weight(n: int, k: int, group: int = 128, zeros: bool = True):
    """A random weight and the float32 matrix that it stands for."""
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=DEVICE)
    scales = ((torch.rand(n, k // group, device=DEVICE) + 0.5) * 0.2 * k**-0.5).half().float()
    z = torch.randint(0, 16, (n, k // group), dtype=torch.uint8, device=DEVICE)
    mins = -z.float() * scales if zeros else (-7.5 * scales).half().float()
    return sg.pack(q, scales, mins, z if zeros else None), AffineTensor(q, scales, mins, 4).dequantize(torch.float32)


def make_weights(n: int, k: int) -> list[sg.Weight]:
    """As many of one shape as exceed the L2 cache."""
    first, _ = make_weight(n, k)
    return [first] + [sg.Weight(first.data.clone(), n, k) for _ in range(copies_for(first.data.nbytes) - 1)]


def floor_us(w: sg.Weight, m: int, limits: Limits) -> float:
    """Of a product of m tokens."""
    return limits.floor_us(w.data.nbytes, 2.0 * m * w.n * w.k)


def check(number: int) -> float:
    """One random case; the relative error by norm. Raises AssertionError on a wrong one."""
    draw = random.Random(number)
    dtype = draw.choice((torch.bfloat16, torch.float16))
    n, k = 16 * draw.choice((1, 3, 12, 40, 130, 384)), 128 * draw.choice((2, 3, 5, 8, 16, 39))
    m = draw.choice((1, 2, 3, 4, 7, 8, 9, 16, 17, 32, 40, 64))
    gated = draw.random() < 0.3
    n = n * 2 if gated else n - draw.choice((0, 0, 8, 3))
    group, zeros = draw.choice((128, 128, 64, 32)), draw.random() < 0.6
    torch.manual_seed(number)
    w, dense = make_weight(n, k, group, zeros)
    x = torch.randn(m, k, device=DEVICE).to(dtype)
    norm = (torch.rand(k, device=DEVICE) + 0.5).to(dtype) if m <= 8 and draw.random() < 0.5 else None
    bias = torch.randn(n, device=DEVICE).to(dtype) if draw.random() < 0.4 else None
    residual = torch.randn(m, n, device=DEVICE).to(dtype) if not gated and draw.random() < 0.4 else None
    activation = draw.choice(ACTIVATIONS) if gated else None
    out_dtype = torch.float32 if draw.random() < 0.2 else None
    offset = draw.choice((0.0, 1.0))
    wide = x.double() if norm is None else rms_norm(x.float(), norm.float(), 1e-5, offset).double()
    expected = wide @ dense.double().T + (0 if bias is None else bias.double())
    if activation:
        expected = gated_activation(expected, activation)
    if residual is not None:
        expected = expected + residual.double()
    tiling = draw.choice([None, *candidates(n, k, m, w.unit_bytes, gated, norm is not None, 4, draw)])
    arguments = {"bias": bias, "residual": residual, "activation": activation, "out_dtype": out_dtype, "tiling": tiling}
    if norm is not None:
        arguments.update(norm_weight=norm, norm_eps=1e-5, norm_offset=offset)
    outs = [
        guarded(expected.shape, out_dtype or dtype, lambda out: sg.skinny_gemm(x, w, out=out, **arguments))
        for _ in range(2)
    ]
    assert torch.equal(*outs), "not deterministic"
    error = ((outs[0].double() - expected).norm() / expected.norm()).item()
    case = f"{number}: {dtype} m {m} n {n} k {k} group {group} zeros {zeros} {tiling} {arguments.keys()}"
    assert error < 1e-2, f"error {error:.2e} in {case}"
    wanted = dense.to(dtype)
    assert (sg.dequantize(w, dtype).float() - wanted.float()).abs().max() <= 1e-2 * wanted.float().abs().max()
    return error


def candidates(n: int, k: int, m: int, unit: int, gated: bool, norm: bool, count: int, draw: random.Random):
    """Random tilings that fit."""
    tiles = -(-n // 16) // (2 if gated else 1)
    token_tiles = 1 if m <= 8 else 2 if m <= 16 else 4 if m <= 32 else 8
    found: list[sg.Tiling] = []
    for _ in range(4000):
        if len(found) == count:
            break
        rows = draw.choice((2, 4, 8) if gated else (1, 2, 4, 8))
        wn, wk = draw.choice((1, 1, 2, 4, 8)), draw.choice((1, 2, 4, 8, 16))
        stages, cluster, minb = draw.choice((1, 2, 3, 4)), draw.choice((1, 1, 1, 2, 4)), draw.choice((1, 1, 2))
        xs = draw.choice((0, 3, 4)) if m > 8 and not norm else 0
        per_block = rows // (2 if gated else 1) * wn
        if not 4 <= wn * wk <= 16 or rows * token_tiles > 32 or k // 128 < cluster * wk:
            continue
        smem = max(wn * wk * stages * rows * unit + xs * wk * token_tiles * 8 * 320, wn * wk * rows * token_tiles * 512)
        if smem > 220_000 // minb or (minb == 2 and wn * wk == 16 and rows * token_tiles > 8):
            continue
        fewest = -(-tiles // per_block)
        waves = max(1, round(fewest * cluster / (132 * minb)))
        blocks = draw.choice(
            (fewest, max(fewest, 132 * minb * waves // cluster), max(fewest, min(tiles, 132 // cluster)))
        )
        tiling = sg.Tiling(rows, wn, wk, stages, cluster, min(blocks, tiles), minb, xs, draw.choice((0, 0, 2)))
        if -(-tiles // tiling.row_blocks) <= per_block and tiling not in found:
            found.append(tiling)
    return found


class Case:
    """One shape and number of tokens, with weights enough to exceed the L2 cache."""

    def __init__(self, shape: tuple[int, int, int], m: int) -> None:
        n, k, gated = shape
        self.n, self.k, self.m, self.gated = n, k, m, bool(gated)
        self.norm, self.residual = m <= 8 and n in (6144, 2048, 28672, 17920), n in (4096, 1536)
        self.weights = make_weights(n, k)

    @property
    def name(self) -> str:
        return f"4:{self.n}x{self.k}:{self.m}"

    def measure(self, tiling: sg.Tiling | None = None) -> float:
        """Microseconds, with the tiling that is chosen by default or another one."""
        x = torch.randn(self.m, self.k, device=DEVICE).bfloat16()
        out = torch.zeros(self.m, self.n // 2 if self.gated else self.n, device=DEVICE, dtype=torch.bfloat16)
        more = {"norm_weight": torch.ones(self.k, device=DEVICE).bfloat16(), "norm_eps": 1e-5} if self.norm else {}
        more |= {"activation": "silu" if self.gated else None, "residual": out if self.residual else None}
        return replay_us([lambda w=w: sg.skinny_gemm(x, w, out=out, tiling=tiling, **more) for w in self.weights])

    def default_tiling(self) -> sg.Tiling:
        return sg.choose_tiling(self.n, self.k, self.m, 4, self.weights[0].unit_bytes, self.gated, self.norm)

    def macros(self, tiling: sg.Tiling) -> dict[str, object]:
        epilogue = Epilogue(is_half=False, out_float=False, kind=GATED if self.gated else int(self.residual))
        return sg.choose_variant(self.weights[0], self.m, epilogue, self.norm, 0.0, tiling).macros(True)

    def tune(self, shortest: float, budget: int) -> tuple[float, sg.Tiling]:
        """The shortest time and its tiling, of the default one and `budget` random ones."""
        draw = random.Random(f"4 {self.n} {self.k} {self.m}")
        best, unit = self.default_tiling(), self.weights[0].unit_bytes
        tried = candidates(self.n, self.k, self.m, unit, self.gated, self.norm, budget, draw)
        compiles = compile_all("skinny_gemm.cu", map(self.macros, tried))
        for tiling in compress(tried, compiles):
            try:
                us = self.measure(tiling)
            except (KernelError, RuntimeError) as error:
                if "illegal" in str(error):
                    raise
                continue
            if us < shortest * 0.985:
                shortest, best = us, tiling
        return shortest, best


def run_checks(count: int) -> list[str]:
    """Check random cases; what is wrong with those that fail."""
    started, errors, failures = time.monotonic(), [], []
    for number in range(count):
        try:
            errors.append(check(number))
        except (AssertionError, KernelError, RuntimeError) as error:
            failures.append(str(error)[:600])
            if "illegal" in str(error):
                break
    print(f"{len(errors)} checks fine, worst error {max(errors, default=0):.1e}, {time.monotonic() - started:.0f} s")
    for failure in failures[:12]:
        print("BAD", failure)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tune", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--checks", type=int, default=150)
    parser.add_argument("--tokens", type=int, nargs="*", help="only these M")
    args = parser.parse_args()
    limits = Limits.measure()
    failures = run_checks(args.checks)
    if failures and args.tune == 0:
        raise SystemExit(1)
    rows: list[dict[str, float]] = []
    tilings: dict[str, sg.Tiling] = {}
    jobs = [(shape, m) for shape in SHAPES for m in TOKENS if not args.tokens or m in args.tokens]
    deadline = time.monotonic() + args.tune
    for index, job in enumerate(jobs):
        case = Case(*job)
        row = {"n": case.n, "k": case.k, "m": case.m, "us": case.measure()}
        row["floor_us"] = floor_us(case.weights[0], case.m, limits)
        tilings[case.name] = case.default_tiling()
        left = deadline - time.monotonic()
        if args.tune and left > 0:
            budget = max(4, int(28 * min(1.0, left / args.tune * len(jobs) / (len(jobs) - index))))
            row["tuned_us"], tilings[case.name] = case.tune(row["us"], budget)
        rows.append(row)
        show(row)
        del case  # its memory, before the next one's
    write(args.out / "skinny_gemm.json", limits, rows, failures=failures)
    write_tilings(args.out / "tilings.json", {name: astuple(tiling) for name, tiling in tilings.items()})


if __name__ == "__main__":
    main()
