"""The GPU's products of one to four tokens that stream packed 4-bit weights: checked, timed beside the others, tuned.

    python -m benchmarks.packed_stream_gemm --out FOLDER [--tune] [--tokens M ...]

A layer's four products run in a chain of layers with decode attention in its place, as replays of a CUDA graph over weights
that exceed the L2 cache: what lies between two kernels counts, and each alone hides it. `--tune` changes one product of the
chain at a time and writes FOLDER/packed_stream_tilings.json in the form of lmdeploy/kernels/cuda/packed_stream_tilings_*.json.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, replace
from functools import partial
from itertools import product as product_of
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.decode_attention import BLOCK_SIZE, make_layers
from benchmarks.gpu import (
    DEVICE,
    Limits,
    compile_all,
    copies_for,
    guarded,
    replay_us,
    replays_us,
    run_checks,
    show,
    write,
    write_tilings,
)
from benchmarks.skinny_gemm import make_weight
from lmdeploy.kernels.cuda import decode_attention, nvrtc, skinny_gemm
from lmdeploy.kernels.cuda import packed_stream_gemm as kernel
from lmdeploy.kernels.cuda.epilogue import ACTIVATIONS, GATED, NOTHING, RESIDUAL, Epilogue
from lmdeploy.kernels.cuda.packed_stream_gemm import Product, Tiling, Variant
from lmdeploy.kernels.cuda.skinny_gemm import Weight
from lmdeploy.kernels.reference.basic import gated_activation, rms_norm
from lmdeploy.kernels.triton import decode_attention as sibling
from tests.kernels.triton.steps import make_spec

# hidden size, rows of qkv, width of the MLP; heads, key-value heads, head size; layers in the chain
MODELS = {
    "internlm2-7b": ((4096, 6144, 14336), (32, 8, 128), 4),
    "qwen2.5-1.5b": ((1536, 2048, 8960), (12, 2, 128), 12),
    "internlm2-1.8b": ((2048, 4096, 8192), (16, 8, 128), 8),
    "llama2-7b": ((4096, 12288, 11008), (32, 32, 128), 4),
    "qwen2.5-7b": ((3584, 4608, 18944), (28, 4, 128), 4),
    "internlm2-20b": ((6144, 8192, 16384), (48, 8, 128), 4),
}
TUNED = ("internlm2-7b", "qwen2.5-1.5b")
CONTEXT = 640
HALF_SM = 112 << 10  # bytes of shared memory of which an SM holds two blocks
Multiply = Callable[..., Tensor]
Tilings = list[Tiling | None]  # of a layer's products; None: the kernel for more tokens multiplies
OTHERS: Tilings = [None] * 4


def check(number: int) -> float:
    """One random case; the relative error by norm. Raises AssertionError on a wrong one."""
    draw = random.Random(number)
    dtype, m, gated = draw.choice((torch.bfloat16, torch.float16)), draw.choice((1, 1, 2, 3, 4)), draw.random() < 0.35
    n, k = 16 * draw.choice((1, 3, 12, 40, 130, 384)), 128 * draw.choice((1, 2, 3, 5, 12, 32, 39, 70))
    n = n * 2 if gated else max(16, n - draw.choice((0, 0, 8, 3)))
    group, zeros = draw.choice((128, 128, 64, 32)), draw.random() < 0.6
    torch.manual_seed(number)
    w, dense = make_weight(n, k, group, zeros)
    x = torch.randn(m, k + 8, device=DEVICE).to(dtype)[:, :k]
    norm = (torch.rand(k, device=DEVICE) + 0.5).to(dtype) if draw.random() < 0.5 else None
    bias = torch.randn(n, device=DEVICE).to(dtype) if draw.random() < 0.4 else None
    residual = torch.randn(m, n, device=DEVICE).to(dtype) if not gated and draw.random() < 0.4 else None
    activation, offset = draw.choice(ACTIVATIONS) if gated else None, draw.choice((0.0, 1.0))
    wide = x.double() if norm is None else rms_norm(x.float(), norm.float(), 1e-5, offset).double()
    expected = wide @ dense.double().T + (0 if bias is None else bias.double())
    expected = gated_activation(expected, activation) if activation else expected
    expected = expected if residual is None else expected + residual.double()
    product = kernel.product_of(w, m, gated, norm is not None)
    tiling = draw.choice([kernel.rule_tiling(product, skinny_gemm.num_sms()), *sample(product, 4, draw)])
    arguments = {"bias": bias, "activation": activation, "tiling": tiling}
    if norm is not None:
        arguments.update(norm_weight=norm, norm_eps=1e-5, norm_offset=offset)
    out_dtype = torch.float32 if draw.random() < 0.4 else dtype
    outs = [
        guarded(
            expected.shape,
            out_dtype,
            lambda out: kernel.packed_stream_gemm(x, w, out=out, residual=residual, **arguments),
        )
        for _ in range(2)
    ]
    assert torch.equal(*outs), "not deterministic"
    if m == 4:  # the same variant for three of them
        rest = None if residual is None else residual[:3]
        fewer = kernel.packed_stream_gemm(x[:3], w, residual=rest, out_dtype=out_dtype, **arguments)
        assert torch.equal(fewer, outs[0][:3]), "a row depends on others"
    error = ((outs[0].double() - expected).norm() / expected.norm()).item()
    case = f"{number}: {dtype} m {m} n {n} k {k} group {group} zeros {zeros} {tiling} {arguments.keys()}"
    assert error < 1e-2, f"error {error:.2e} in {case}"
    return error


def shapes_of_warps(product: Product) -> Iterator[Tiling]:
    """Ways to cut a product that waste little and fit, all other choices left at their defaults."""
    blocks = min(skinny_gemm.num_sms(), product.tiles)
    held = -(-product.tiles // blocks)
    for warps_k in range(1, min(product.units, kernel.MAX_WARPS) + 1):
        units = -(-product.units // warps_k)
        if -(-product.units // units) != warps_k or units * warps_k > 1.05 * product.units:
            continue
        for warps_n in range(1, min(held, kernel.MAX_WARPS // warps_k) + 1):
            if warps_k * warps_n < (4 if held <= 2 else 8):
                continue
            for tiles, parts in product_of({1, 2, -(-held // warps_n)}, range(1, units + 1)):
                depth = -(-held // (warps_n * tiles)) * parts
                deep = [Tiling(warps_k, warps_n, tiles, stages, blocks, parts=parts) for stages in range(1, depth + 1)]
                fitting = [t for t in deep if product.fits(t) and tiles * warps_n < held + warps_n]
                small = [t for t in fitting if product.shared_bytes(t) <= HALF_SM]
                if parts == 1 or fitting[-1:] != deep[-1:]:  # else all that the block has is in the ring at once
                    yield from dict.fromkeys([*fitting[-1:], *small[-1:]])


def sample(product: Product, count: int, draw: random.Random) -> list[Tiling]:
    """A few of them with everything that can be chosen beside."""
    found = list(shapes_of_warps(product))
    found = draw.sample(found, min(count, len(found)))
    return [
        replace(
            t,
            row_blocks=max(t.row_blocks - draw.choice((0, 0, 7)), 1),
            is_early=t.row_blocks > 7 and product.fits(replace(t, is_early=True, row_blocks=t.row_blocks - 7)),
        )
        for t in found
        if product.fits(replace(t, row_blocks=max(t.row_blocks - 7, 1)))
    ]


def neighbours(t: Tiling, product: Product) -> list[Tiling]:
    """What else can be chosen without another cut."""
    held = -(-product.tiles // t.row_blocks)
    fewest = -(-product.tiles // held)
    changed = [
        replace(t, blocks_per_sm=2), replace(t, is_early=not t.is_early), replace(t, row_blocks=fewest),
        replace(t, parts=2 * t.parts, stages=2 * t.stages),
        replace(t, row_blocks=min(product.tiles, 2 * skinny_gemm.num_sms()), stages=1),
    ]  # fmt: skip
    return [one for one in dict.fromkeys(changed) if one != t and product.fits(one)]


class Chain:
    """The products of a model's layers, with attention between the first two, for m tokens."""

    def __init__(self, model: str, m: int, group: int = 128) -> None:
        (hidden, qkv, inner), heads, count = MODELS[model]
        self.model, self.m = model, m
        unit, tokens = skinny_gemm.unit_bytes(group), 4 if m > 2 else m
        self.products = [
            Product(qkv, hidden, tokens, unit, has_norm=True), Product(hidden, hidden, tokens, unit),
            Product(2 * inner, hidden, tokens, unit, is_gated=True, has_norm=True), Product(hidden, inner, tokens, unit),
        ]  # fmt: skip
        firsts = [make_weight(p.n, p.k, group)[0] for p in self.products]
        self.layers = [[Weight(w.data.clone(), w.n, w.k, 4, group) for w in firsts] for _ in range(count)]
        self.num_bytes = sum(w.data.nbytes for w in firsts)
        self.h, self.gamma = (
            torch.randn(m, hidden, device=DEVICE).bfloat16(),
            torch.ones(hidden, device=DEVICE).bfloat16(),
        )
        self.wide, self.inner = (torch.zeros(m, size, device=DEVICE).bfloat16() for size in (qkv, inner))
        self._prepare_attention(heads, count)

    def _prepare_attention(self, heads: tuple[int, int, int], count: int) -> None:
        self.spec, blocks = make_spec(*heads), -(-CONTEXT // BLOCK_SIZE)
        self.cache = make_layers(count, self.m * blocks, self.spec, 16)
        self.tables = torch.arange(self.m * blocks, device=DEVICE).int().view(self.m, blocks)
        lengths = torch.full((self.m,), CONTEXT, dtype=torch.int32, device=DEVICE)
        shape = decode_attention.choose_shape(self.cache[0][0], self.spec, self.m)
        scratch = sibling.make_scratch(self.m, CONTEXT, heads[0], heads[2], DEVICE, shape.min_split, shape.whole)
        self.work, self.shape = sibling.plan(lengths, scratch), shape
        self.cos, self.sin = torch.rand(2, self.m, heads[2] // 2, device=DEVICE)

    def run(self, layer: int, multiply: list[Multiply], has_attention: bool) -> None:
        weights, norm = self.layers[layer], {"norm_weight": self.gamma, "norm_eps": 1e-5}
        multiply[0](self.h, weights[0], out=self.wide, **norm)
        hidden = self.wide[:, : self.h.shape[1]]
        if has_attention:
            hidden = self.attend(layer)
        multiply[1](hidden, weights[1], out=self.h, residual=self.h)
        multiply[2](self.h, weights[2], out=self.inner, activation="silu", **norm)
        multiply[3](self.inner, weights[3], out=self.h, residual=self.h)

    def attend(self, layer: int) -> Tensor:
        """A layer's decode attention to what its first product has left."""
        return decode_attention.rope_store_attend(
            self.wide, self.cos, self.sin, *self.cache[layer], self.tables, self.work, self.spec,
            may_overlap=True, shape=self.shape,
        )  # fmt: skip

    def calls(self, tilings: Tilings, has_attention: bool = True) -> list[Callable[[], None]]:
        """One per layer."""
        multiply = [self.multiply(tiling) for tiling in tilings]
        return [partial(self.run, layer, multiply, has_attention) for layer in range(len(self.layers))]

    @staticmethod
    def multiply(tiling: Tiling | None) -> Multiply:
        """The product with this tiling, or by the kernel for more tokens."""
        return skinny_gemm.skinny_gemm if tiling is None else partial(kernel.packed_stream_gemm, tiling=tiling)

    def time(self, tilings: Tilings) -> float:
        """Microseconds of a layer; endless where something cannot be compiled or launched."""
        try:
            return replay_us(self.calls(tilings))
        except nvrtc.KernelError as error:
            print("BAD", tilings, error)
            return float("inf")

    def time_each(self, tilings: Tilings) -> list[float]:
        """Microseconds of each product, behind itself."""
        found = []
        for index, product in enumerate(self.products):
            x = torch.randn(self.m, product.k, device=DEVICE).bfloat16()
            out = (self.wide, self.h, self.inner, self.h)[index]
            more: dict[str, object] = {"activation": "silu"} if product.is_gated else {}
            more |= {"norm_weight": self.gamma, "norm_eps": 1e-5} if product.has_norm else {"residual": out}
            function, first = self.multiply(tilings[index]), self.layers[0][index]
            copies = [replace(first, data=first.data.clone()) for _ in range(copies_for(first.data.nbytes))]
            found.append(replay_us([partial(function, x, w, out=out, **more) for w in copies]))
        return found

    def time_cublas(self) -> list[float]:
        """Microseconds of each product by cuBLAS over 16-bit copies, without what is fused."""
        found = []
        for index, product in enumerate(self.products):
            x = torch.randn(self.m, product.k, device=DEVICE).bfloat16()
            first = skinny_gemm.dequantize(self.layers[0][index], torch.bfloat16)
            copies = [first.clone() for _ in range(copies_for(first.nbytes))]
            found.append(replay_us([partial(torch.mm, x, copy.T) for copy in copies]))
        return found

    def variant(self, index: int, tiling: Tiling) -> Variant:
        product = self.products[index]
        kind = GATED if product.is_gated else NOTHING if product.has_norm else RESIDUAL
        return Variant(product, self.layers[0][index].group_size, True, Epilogue(False, False, kind), 0.0, tiling)


def build(variants: Iterable[Variant]) -> None:
    """Compile in parallel; one that does not compile fails again where it is launched."""
    compile_all("packed_stream_gemm.cu", [variant.macros() for variant in variants])


def descend(chain: Chain, best: Tilings, tried: list[Tilings], deadline: float) -> Tilings:
    """The tilings of the fastest chain, one product changed at a time, those first that have most bytes."""
    shortest = chain.time(best)
    for index in (2, 3, 0, 1):
        for tiling in tried[index]:
            if time.monotonic() > deadline:
                break
            changed = [*best[:index], tiling, *best[index + 1 :]]
            us = chain.time(changed)
            if us < 0.997 * shortest and (us := max(us, chain.time(changed))) < 0.997 * shortest:
                shortest, best = us, changed
        chosen = best[index]
        print(f"  {chain.products[index].name} {chosen and astuple(chosen)} {shortest:.2f} us a layer", flush=True)
    return best


def presets(chain: Chain, rule: list[Tiling], cuts: list[list[Tiling]]) -> Iterator[Tilings]:
    """Rings of all products small, so that several kernels have theirs in an SM, or as large as they can be."""
    yield list(rule)
    for limit in (76 << 10, HALF_SM, 227 << 10):
        found: Tilings = []
        for product, usual, tilings in zip(chain.products, rule, cuts, strict=True):
            sizes = {t: product.shared_bytes(t) for t in tilings if t.warps_k == usual.warps_k} or {usual: 0}
            fitting = {t: size for t, size in sizes.items() if size <= limit} or {min(sizes, key=sizes.__getitem__): 0}
            found.append(max(fitting, key=fitting.__getitem__))
        yield found


def tune(chain: Chain, start: Tilings | None, seconds: float) -> Tilings:
    """The fastest chain's tilings that were found from several presets, or from those of fewer tokens, in about that time."""
    products, deadline = chain.products, time.monotonic() + seconds
    rule = [kernel.rule_tiling(product, skinny_gemm.num_sms()) for product in products]
    cuts = [list(shapes_of_warps(product)) if start is None else [] for product in products]
    if start is None:
        starts = list(presets(chain, rule, cuts))
    else:
        starts = [[s if s and p.fits(s) else r for s, p, r in zip(start, products, rule, strict=True)]]
    build(chain.variant(i, t) for i in range(4) for t in [*cuts[i], *(tilings[i] for tilings in starts)])
    best = min([OTHERS, *starts], key=chain.time)
    best = descend(chain, best, [[*tried, None] for tried in cuts], deadline)
    for _ in range(2):
        near = [neighbours(t, p) if t else [] for t, p in zip(best, products, strict=True)]
        build(chain.variant(i, t) for i in range(4) for t in near[i])
        best, last = descend(chain, best, [[*tried, None] for tried in near], deadline), best
        if best == last or time.monotonic() > deadline:
            break
    return best


def measure(chain: Chain, tilings: Tilings, limits: Limits) -> list[dict[str, object]]:
    """The chain's figures, with and without attention, and each product's."""
    build(chain.variant(index, tiling) for index, tiling in enumerate(tilings) if tiling)
    rows: list[dict[str, object]] = []
    for has_attention in (True, False):
        times = replays_us(
            {name: chain.calls(t, has_attention) for name, t in (("us", tilings), ("skinny_us", OTHERS))}
        )
        row = {"layer": chain.model, "m": chain.m, "attention": has_attention, **times}
        rows.append(row | {"floor_us": limits.floor_us(chain.num_bytes)})
    each = zip(chain.products, chain.time_each(tilings), chain.time_each(OTHERS), chain.time_cublas(), strict=True)
    for product, us, skinny_us, cublas_us in each:
        floor = limits.floor_us(product.n // 16 * product.units * product.unit_bytes)
        rows.append(
            {"n": product.n, "k": product.k, "m": chain.m, "us": us, "skinny_us": skinny_us, "cublas_16_bits_us": cublas_us,
             "floor_us": floor}
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", type=float, default=25.0, help="of each model's search for the first of --tokens")
    parser.add_argument("--checks", type=int, default=40)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    limits = Limits.measure()
    run_checks(check, args.checks)
    rows: list[dict[str, object]] = []
    table: dict[str, tuple[object, ...]] = {}
    for model in TUNED:
        best: Tilings | None = None
        for m in args.tokens:
            chain = Chain(model, m)
            if args.tune:
                best = tune(chain, best, args.seconds if best is None else args.seconds / 4)
            tilings = best or [
                kernel.choose_tiling(p) or kernel.rule_tiling(p, skinny_gemm.num_sms()) for p in chain.products
            ]
            found = measure(chain, tilings, limits)
            for row in found:
                show(row)
            rows += found
            table |= {
                p.name: astuple(tiling) if tiling else () for p, tiling in zip(chain.products, tilings, strict=True)
            }
            write(args.out / "packed_stream_gemm.json", limits, rows)
            write_tilings(args.out / "packed_stream_tilings.json", table)
            del chain  # its memory, before the next one's


if __name__ == "__main__":
    main()
