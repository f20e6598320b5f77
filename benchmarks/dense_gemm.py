"""The GPU's products with plain 16-bit weights: checked against float64 and timed beside cuBLAS.

    python -m benchmarks.dense_gemm [--checks N] [--tokens M ...] [--out FILE]

Single products are timed over weights that exceed the L2 cache several times, the four products of a layer in a chain of
layers, each as a replay of a CUDA graph, beside the floors of benchmarks/gpu.py. cuBLAS is timed without norm and residual,
in the chain with the activation's own kernel.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import DEVICE, Limits, copies_for, guarded, replay_us, show, write
from lmdeploy.kernels import gated_activation
from lmdeploy.kernels.cuda import batch_gemm, dense, stream_gemm, tensor_gemm
from lmdeploy.kernels.cuda.epilogue import ACTIVATIONS
from lmdeploy.kernels.reference import basic

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Shape:
    """A product of a layer: rows and columns of its weight, and what is fused with it."""

    n: int
    k: int
    is_gated: bool = False
    has_norm: bool = False
    has_residual: bool = False
    is_wide: bool = False

    @property
    def num_bytes(self) -> int:
        return self.n * self.k * 2

    def floor_us(self, m: int, limits: Limits) -> float:
        return limits.floor_us(self.num_bytes, m * self.num_bytes)  # two operations a number, of two bytes


def layer(hidden: int, qkv: int, inner: int) -> list[Shape]:
    """qkv, o, gate and up, down."""
    return [
        Shape(qkv, hidden, has_norm=True), Shape(hidden, hidden, has_residual=True),
        Shape(2 * inner, hidden, is_gated=True, has_norm=True), Shape(hidden, inner, has_residual=True),
    ]  # fmt: skip


LAYERS = {"internlm2-7b": (layer(4096, 6144, 14336), 4), "qwen2.5-1.5b": (layer(1536, 2048, 8960), 12)}
HEADS = [Shape(92544, 4096, is_wide=True), Shape(151936, 1536, is_wide=True)]


def check(number: int) -> float:
    """One random case of one of the two kernels; the relative error by norm. Raises AssertionError on a wrong one."""
    draw = random.Random(number)
    torch.manual_seed(number)
    is_streamed = draw.random() < 0.5
    m = draw.choice((1, 2, 3, 4) if is_streamed else (1, 5, 8, 16, 17, 33, 64, 65, 100, 128))
    k, gated = draw.choice((128, 264, 576, 1536, 2056, 4096, 8960)), draw.random() < 0.35
    n = draw.choice((16, 40, 133, 1000, 2056)) if is_streamed else 8 * draw.choice((8, 25, 125, 257, 513))
    n, dtype = n * (2 if gated else 1), draw.choice((torch.bfloat16, torch.float16))
    weight = (torch.randn(n, k, device=DEVICE) * k**-0.5).to(dtype)
    x = torch.randn(m, k + 8, device=DEVICE).to(dtype)[:, :k]
    arguments: dict[str, object] = {}
    expected = x.float()
    if is_streamed and draw.random() < 0.5:
        gamma = (torch.rand(k, device=DEVICE) + 0.5).to(dtype)
        arguments.update(norm_weight=gamma, norm_eps=1e-5, norm_offset=1.0)
        expected = basic.rms_norm(expected, gamma.float(), 1e-5, 1.0)
    expected = expected.double() @ weight.double().T
    if draw.random() < 0.5:
        arguments["bias"] = bias = torch.randn(n, device=DEVICE).to(dtype)
        expected = expected + bias.double()
    if gated:
        arguments["activation"] = draw.choice(ACTIVATIONS)
        expected = basic.gated_activation(expected, str(arguments["activation"]))
    elif draw.random() < 0.5:
        arguments["residual"] = residual = torch.randn(m, n, device=DEVICE).to(dtype)
        expected = expected + residual.double()
    function = stream_gemm.stream_gemm if is_streamed else tensor_gemm.tensor_gemm
    out_dtype = torch.float32 if draw.random() < 0.3 else dtype
    outs = [guarded(expected.shape, out_dtype, lambda out: function(x, weight, out=out, **arguments)) for _ in range(2)]
    assert torch.equal(*outs), "not deterministic"
    error = ((outs[0].double() - expected).norm() / expected.norm()).item()
    assert error < 1e-2, f"error {error:.2e} in {number}: {function.__name__} {dtype} {m} {n} {k} {arguments.keys()}"
    return error


def multiply(shape: Shape, x: Tensor, weight: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """The product as a layer runs it, by the kernel that is chosen for it."""
    is_streamed, tiling = dense.is_streamed(x, weight), batch_gemm.tiling_for(x, weight, shape.is_gated)
    more: dict[str, object] = {"activation": "silu"} if shape.is_gated else {}
    if shape.has_residual:
        more["residual"] = out
    if tiling is not None:
        return batch_gemm.batch_gemm(x, weight, tiling, out=out, **more)  # type: ignore[arg-type]
    if not is_streamed and not dense.is_for_tensor_cores(x, weight, shape.is_gated):
        return library(shape, x, weight, out)
    if shape.has_norm and is_streamed:
        more.update(norm_weight=gamma, norm_eps=1e-5)
    function = stream_gemm.stream_gemm if is_streamed else tensor_gemm.tensor_gemm
    return function(x, weight, out=out, **more)  # type: ignore[operator]


def library(shape: Shape, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """The same by cuBLAS."""
    if shape.is_gated:
        return gated_activation(torch.mm(x, weight.T), "silu")
    if shape.is_wide:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return out.addmm_(x, weight.T) if shape.has_residual else torch.mm(x, weight.T, out=out)


def make_weight(shape: Shape) -> Tensor:
    return (torch.randn(shape.n, shape.k, device=DEVICE) * shape.k**-0.5).bfloat16()


def measure_single(shape: Shape, m: int, limits: Limits) -> dict[str, float]:
    """Microseconds of one product and of cuBLAS, over copies of the weight."""
    first = make_weight(shape)
    weights = [first] + [first.clone() for _ in range(copies_for(shape.num_bytes) - 1)]
    x, gamma = torch.randn(m, shape.k, device=DEVICE).bfloat16(), torch.ones(shape.k, device=DEVICE).bfloat16()
    outs = shape.n // 2 if shape.is_gated else shape.n
    out = torch.zeros(m, outs, device=DEVICE, dtype=torch.float32 if shape.is_wide else torch.bfloat16)
    return {
        "n": shape.n, "k": shape.k, "m": m,
        "us": replay_us([lambda w=w: multiply(shape, x, w, gamma, out) for w in weights]),
        "floor_us": shape.floor_us(m, limits),
        "cublas_us": replay_us([lambda w=w: library(shape, x, w, out) for w in weights]),
    }  # fmt: skip


def measure_chain(name: str, m: int, limits: Limits) -> dict[str, object]:
    """Microseconds of the products of one layer in a chain of layers."""
    shapes, count = LAYERS[name]
    layers = [[make_weight(shape) for shape in shapes] for _ in range(count)]
    hidden, qkv = shapes[0].k, shapes[0].n
    h, gamma = torch.randn(m, hidden, device=DEVICE).bfloat16(), torch.ones(hidden, device=DEVICE).bfloat16()
    wide, inner = (torch.zeros(m, size, device=DEVICE).bfloat16() for size in (qkv, shapes[3].k))
    steps = list(zip(shapes, (h, wide[:, :hidden], h, inner), (wide, h, inner, h), strict=True))

    def run(weights: list[Tensor], own: bool) -> None:
        for (shape, x, out), w in zip(steps, weights, strict=True):
            multiply(shape, x, w, gamma, out) if own else library(shape, x, w, out)

    floor = sum(shape.floor_us(m, limits) for shape in shapes)
    us, cublas = (replay_us([lambda ws=ws, own=own: run(ws, own) for ws in layers]) for own in (True, False))
    return {"layer": name, "m": m, "us": us, "floor_us": floor, "cublas_us": cublas}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checks", type=int, default=80)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    limits = Limits.measure()
    worst = max((check(number) for number in range(args.checks)), default=0.0)
    print(f"{args.checks} checks fine, worst error {worst:.1e}")
    rows: list[dict[str, float]] = []
    for m in args.tokens:
        rows += [measure_chain(name, m, limits) for name in LAYERS]
        rows += [measure_single(shape, m, limits) for shapes, _ in LAYERS.values() for shape in shapes]
        rows += [measure_single(shape, m, limits) for shape in HEADS]
    for row in rows:
        show(row)
    write(args.out, limits, rows)


if __name__ == "__main__":
    main()
