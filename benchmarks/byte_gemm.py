"""The GPU's 4-bit products whose rows do not depend on how many there are: checked, and timed beside those that do.

    python -m benchmarks.byte_gemm [--out FILE.json]

Times are of a layer's products with their norms, without attention: replays of CUDA graphs over weights that exceed the L2
cache, floors those of benchmarks/gpu.py, in microseconds.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import DEVICE, ROTATED_BYTES, Call, Limits, guarded, replay_us, run_checks, show, write
from benchmarks.skinny_gemm import SHAPES, floor_us, make_weight
from lmdeploy.kernels import invariant
from lmdeploy.kernels.cuda import affine
from lmdeploy.kernels.cuda.affine import PackedAffine
from lmdeploy.kernels.cuda.byte_gemm import byte_gemm
from lmdeploy.kernels.cuda.epilogue import ACTIVATIONS
from lmdeploy.kernels.reference.basic import gated_activation, rms_norm

TOKENS = (1, 7, 16, 24, 32, 64)


def check(number: int) -> float:
    """One random case, between poison, and some of its rows alone. Raises AssertionError on a wrong one.

    Returns the largest error beside the root mean square of what is expected.
    """
    draw = random.Random(number)
    torch.manual_seed(number)
    dtype, group = draw.choice((torch.bfloat16, torch.float16)), draw.choice((128, 128, 64, 32))
    n, k = 16 * draw.choice((2, 3, 12, 40, 130, 384, 1100)), 128 * draw.choice((1, 3, 5, 8, 16, 39))
    activation = draw.choice(ACTIVATIONS) if draw.random() < 0.3 else None
    n = n if n % 32 == 0 and activation else n - draw.choice((0, 0, 8, 3))
    activation = activation if n % 32 == 0 else None
    w, wide = make_weight(n, k, group, draw.random() < 0.6)
    x = torch.randn(draw.choice((1, 7, 8, 15, 32, 33, 64)), k, device=DEVICE).to(dtype)
    x[:, 3] *= draw.choice((1, 200))
    bias = torch.randn(n, device=DEVICE).to(dtype) if draw.random() < 0.4 else None
    residual = torch.randn(len(x), n, device=DEVICE).to(dtype) if not activation and draw.random() < 0.4 else None
    more: dict[str, object] = {"bias": bias, "activation": activation}
    expected = x.double()
    if draw.random() < 0.5:
        gamma = (torch.rand(k, device=DEVICE) + 0.5).to(dtype)
        more |= {"norm_weight": gamma, "norm_eps": 1e-5, "norm_offset": draw.choice((0.0, 1.0))}
        expected = rms_norm(x.float(), gamma.float(), 1e-5, more["norm_offset"]).double()  # type: ignore[arg-type]
    expected = expected @ wide.double().T + (0 if bias is None else bias.double())
    expected = expected if activation is None else gated_activation(expected, activation)
    expected = expected if residual is None else expected + residual.double()
    out_dtype = draw.choice((dtype, torch.float32))
    case = f"{number}: {dtype} {n}x{k} {len(x)} tokens, group {group}, zeros {w.has_zeros}, {sorted(more)}"

    def run(rows: slice) -> Tensor:
        addend = None if residual is None else residual[rows]
        shape = expected[rows].shape
        return guarded(shape, out_dtype, lambda out: byte_gemm(x[rows], w, residual=addend, out=out, **more))  # type: ignore[arg-type]

    whole = run(slice(None))
    for rows in (slice(None), slice(0, 1), slice(len(x) // 3, len(x) // 2 + 1)):
        assert torch.equal(run(rows), whole[rows]), f"other bits for rows {rows} of {case}"
    error = ((whole.double() - expected).abs() - 2.0**-8 * expected.abs()).max() / expected.square().mean().sqrt()
    assert error < 2e-2, f"error {error} in {case}"
    x[0, 5] = float("nan")
    assert bool(run(slice(0, 1)).isnan().all()), f"no NaN in {case}"
    return error.item()


class Layers:
    """Products of layers that exceed the L2 cache, one after the other, without attention."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], m: int) -> None:
        hidden = shapes[0][1]
        one = sum(n * k // 2 for n, k, _ in shapes)
        self.layers = [
            [PackedAffine(make_weight(n, k)[0]) for n, k, _ in shapes] for _ in range(2 + ROTATED_BYTES // one)
        ]
        self.x = torch.randn(m, shapes[1][1], device=DEVICE).bfloat16()
        self.h = torch.randn(m, hidden, device=DEVICE).bfloat16()
        self.norm = {"norm_weight": torch.ones(hidden, device=DEVICE).bfloat16(), "norm_eps": 1e-5}

    def run(self, layer: list[PackedAffine]) -> None:
        qkv, o, gate_up, down = layer
        affine.linear(self.h, qkv, **self.norm)  # type: ignore[arg-type]
        h = affine.linear(self.x, o, residual=self.h)
        affine.gated_mlp(h, gate_up, down, "silu", residual=h, **self.norm)  # type: ignore[arg-type]

    @property
    def calls(self) -> list[Call]:
        return [partial(self.run, layer) for layer in self.layers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--checks", type=int, default=12)
    args = parser.parse_args()
    limits = Limits.measure()
    run_checks(check, args.checks)
    rows: list[dict[str, object]] = []
    for name, shapes in (("internlm2-7b", SHAPES[:4]), ("qwen2.5-1.5b", SHAPES[4:])):
        for m in TOKENS:
            layers = Layers(shapes, m)
            times = {}
            for kind, is_on in (("usual", False), ("us", True)):
                invariant._is_on = is_on
                times[kind] = replay_us(layers.calls)
            floor = sum(floor_us(w.weight, m, limits) for w in layers.layers[0])
            rows.append({"layer": name, "tokens": m, **times, "floor": floor})
            show(rows[-1])
    write(args.out, limits, rows)


if __name__ == "__main__":
    main()
