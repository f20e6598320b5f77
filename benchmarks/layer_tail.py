"""The GPU kernel of all products behind a layer's attention, for one token: checked, and timed beside its products one by one.

    python -m benchmarks.layer_tail [--out FILE.json]

As in packed_stream_gemm: layers in a chain with decode attention in its place, replays of a CUDA graph, weights that exceed
the L2 cache.
"""

from __future__ import annotations

import argparse
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import DEVICE, Limits, replays_us, run_checks, show, write
from benchmarks.packed_stream_gemm import MODELS, Chain
from benchmarks.skinny_gemm import make_weight
from lmdeploy.kernels.cuda import layer_tail
from lmdeploy.kernels.cuda.epilogue import ACTIVATIONS
from lmdeploy.kernels.cuda.layer_tail import Behind
from lmdeploy.kernels.cuda.packed_stream_gemm import choose_tiling
from lmdeploy.kernels.cuda.skinny_gemm import Weight
from lmdeploy.kernels.reference.basic import gated_activation, rms_norm


def check(number: int) -> float:
    """One random case, three times and with a NaN; the larger relative error by norm. Raises AssertionError on a wrong one."""
    draw = random.Random(number)
    torch.manual_seed(number)
    dtype, group, zeros = (
        draw.choice((torch.bfloat16, torch.float16)),
        draw.choice((128, 128, 64, 32)),
        draw.random() < 0.6,
    )
    heads, hidden, inner = (128 * draw.choice((8, 9, 12, 16, 28, 32)) for _ in range(3))
    qkv, activation, offset = 16 * draw.choice((0, 1, 40, 131, 384)), draw.choice(ACTIVATIONS), draw.choice((0.0, 1.0))
    (o, wide_o), (gate_up, wide_gate_up), (down, wide_down) = (
        make_weight(n, k, group, zeros) for n, k in ((hidden, heads), (2 * inner, hidden), (hidden, inner))
    )
    x, residual = (torch.randn(1, n, device=DEVICE).to(dtype) for n in (heads, hidden))
    x[0, :4] *= draw.choice((1, 200))
    gamma, next_gamma = ((torch.rand(hidden, device=DEVICE) + 0.5).to(dtype) for _ in range(2))
    behind, expected = None, []
    h = x.double() @ wide_o.double().T + residual.double()
    normed = rms_norm(h.to(dtype).float(), gamma.float(), 1e-5, offset).double()
    inside = gated_activation(normed @ wide_gate_up.double().T, activation)
    expected.append(h + inside @ wide_down.double().T)
    if qkv:
        last, wide_last = make_weight(qkv, hidden, group, zeros)
        bias = torch.randn(qkv, device=DEVICE).to(dtype) if draw.random() < 0.5 else None
        behind = Behind(next_gamma, last, bias)
        normed = rms_norm(expected[0].to(dtype).float(), next_gamma.float(), 1e-5, offset).double()
        expected.append(normed @ wide_last.double().T + (0 if bias is None else bias.double()))
    norm = {"norm_weight": gamma, "norm_eps": 1e-5, "norm_offset": offset}
    results = [
        layer_tail.layer_tail(x, residual, o, gate_up, down, activation, behind=behind, **norm) for _ in range(3)
    ]
    case = f"{number}: {dtype} {heads} {hidden} {inner} {qkv} group {group} zeros {zeros} {activation} {offset}"
    assert all(
        torch.equal(a, b) for again in results[1:] for a, b in zip(results[0], again, strict=True) if a is not None
    ), case
    found = [tensor for tensor in results[0] if tensor is not None]
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    assert max(errors) < 1e-2, f"errors {errors} in {case}"
    x[0, 5] = float("nan")
    nowhere = layer_tail.layer_tail(x, residual, o, gate_up, down, activation, behind=behind, **norm)
    assert all(bool(tensor.isnan().all()) for tensor in nowhere if tensor is not None), f"no NaN in {case}"
    return max(errors)


def compile_for(model: str) -> None:
    """The kernel of a chain below."""
    (hidden, qkv, inner), heads, _ = MODELS[model]
    shape = layer_tail.Shape(heads[0] * heads[2], hidden, inner, qkv)
    layer_tail.cubin(layer_tail.variant_of(shape, Weight(torch.empty(0), 16, 128, 4, 128), False, "silu", 0.0))


class TailChain(Chain):
    """The same layers, each attention followed by one launch."""

    def run_tail(self, layer: int) -> None:
        hidden = self.attend(layer)
        _, o, gate_up, down = self.layers[layer]
        behind = Behind(self.gamma, self.layers[(layer + 1) % len(self.layers)][0], None)
        norm: dict[str, Tensor | float] = {"norm_weight": self.gamma, "norm_eps": 1e-5}
        self.h, qkv = layer_tail.layer_tail(hidden, self.h, o, gate_up, down, "silu", behind=behind, **norm)  # type: ignore[arg-type]
        assert qkv is not None
        self.wide = qkv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--checks", type=int, default=12)
    args = parser.parse_args()
    limits = Limits.measure()
    run_checks(check, args.checks)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(compile_for, MODELS))
    layer_tail.give_up(torch.cuda.current_stream())
    torch.cuda.synchronize()
    torch.cuda.set_stream(torch.cuda.Stream())  # of the captures, too
    rows: list[dict[str, object]] = []
    for model in MODELS:
        chain = TailChain(model, 1)
        tilings = [choose_tiling(product) for product in chain.products]
        calls = {"us": [partial(chain.run_tail, layer) for layer in range(len(chain.layers))]}
        times = replays_us(calls | {"products_us": chain.calls(tilings)})
        rows.append({"layer": model, **times, "floor_us": limits.floor_us(chain.num_bytes)})
        show(rows[-1])
        del chain
    write(args.out, limits, rows)


if __name__ == "__main__":
    main()
