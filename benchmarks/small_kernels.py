"""Check and time the small Triton kernels on one NVIDIA GPU: norms, activations, sampling, affine weights, experts.

    python benchmarks/small_kernels.py [--out FILE] [--only WORD] [--check-only]

Shapes are those of InternLM2-7B, Qwen2.5-1.5B and Mixtral-8x7B with random numbers. Times are medians of replays of a
CUDA graph that holds many launches over different buffers, so that what a step would find in memory is not found in the
cache. Floors: bytes over the bandwidth of a large copy, operations over the rate of a large cuBLAS product, both
measured at the start.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from lmdeploy.kernels.reference import affine as affine_twin
from lmdeploy.kernels.reference import basic
from lmdeploy.kernels.reference import moe as moe_twin
from lmdeploy.kernels.triton import affine, moe, sampling
from lmdeploy.kernels.triton.activation import gated_activation
from lmdeploy.kernels.triton.norm import add_rms_norm, rms_norm

MODELS = {"7B": (4096, 14336, 92544), "1.5B": (1536, 8960, 151936)}  # C, I, V
EXPERTS, CHOICES, EXPERT_SIZE = 8, 2, 14336
ROWS = (1, 8, 64, 256, 8192)
CACHE_BYTES = 120 << 20  # more than any second-level cache
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DEVICE = torch.device("cuda")

Call = Callable[[], object]


@dataclass
class Figure:
    """One line of the table. floor_us: what bandwidth and arithmetic rate allow."""

    name: str
    us: float
    gb_s: float
    floor_us: float
    of_floor: float


class Device:
    """The measured limits of the GPU, and graph replays on it."""

    def __init__(self) -> None:
        source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
        self.bytes_per_s = 2e6 * len(source) / replay_us([lambda: target.copy_(source)])
        a, b = (torch.randn(8192, 8192, device=DEVICE).bfloat16() for _ in range(2))
        self.flops_per_s = 2e6 * 8192**3 / replay_us([lambda: a @ b])

    def time(self, name: str, calls: list[Call], num_bytes: float, flops: float = 0.0) -> Figure:
        us = replay_us(calls)
        floor_us = 1e6 * max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)
        figure = Figure(name, round(us, 2), round(num_bytes / us / 1e3, 1), round(floor_us, 2), round(floor_us / us, 3))
        print(
            f"{name:58s} {figure.us:10.2f} {figure.gb_s:9.1f} {figure.floor_us:10.2f} {figure.of_floor:8.1%}",
            flush=True,
        )
        return figure


def replay_us(calls: list[Call], replays: int = 5) -> float:
    """Median microseconds of one call in replays of a graph of at least ten of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = -(-10 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / (rounds * len(calls)))
    return median(times)


def copies_for(num_bytes: int) -> int:
    """How many buffers of this size no cache holds; at most sixteen."""
    return max(1, min(16, -(-CACHE_BYTES // num_bytes)))


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def check_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.float() - expected.float()).abs().max().item() / max(1e-6, expected.abs().max().item())
    if not error <= tolerance:
        raise SystemExit(f"{name}: off by {error:.2e} of the largest value, at most {tolerance:.0e} is right")


def packed_weight(n: int, k: int, bits: int = 4, group: int = 128) -> affine.PackedAffine:
    q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device=DEVICE)
    scales = (0.04 * 2.0**-bits * (0.5 + torch.rand(n, k // group, device=DEVICE))).half().float()
    return affine.pack(q, scales, -scales * 2 ** (bits - 1), bits)


# Correctness


def check_rows() -> None:
    for dtype, tolerance in TOLERANCE.items():
        for rows, columns in ((1, 4096), (5, 1536), (3, 16384), (7, 577)):
            x, residual = random(rows, columns + 8, dtype=dtype)[:, :columns], random(rows, columns, dtype=dtype)
            weight = random(columns, dtype=dtype)
            expected = basic.rms_norm(x.float(), weight.float(), 1e-5)
            check_close("rms_norm", rms_norm(x, weight, 1e-5), expected, tolerance)
            total, normed = add_rms_norm(x, residual, weight, 1e-5)
            check_close("add_rms_norm sum", total, x.float() + residual.float(), tolerance)
            check_close("add_rms_norm", normed, basic.rms_norm(total.float(), weight.float(), 1e-5), tolerance)
        for activation in ("silu", "gelu", "gelu_tanh"):
            gate_up = random(5, 2 * 1501, dtype=dtype)
            expected = basic.gated_activation(gate_up.float(), activation)
            check_close(activation, gated_activation(gate_up, activation), expected, tolerance)


def expected_draw(logits: Tensor, setting: tuple[float, int, float, float], number: float) -> int:
    """By definition, in float64; of ties at top_p the first stay."""
    temperature, top_k, top_p, min_p = setting
    scaled = logits.double() / temperature
    if 0 < top_k < len(scaled):
        scaled = scaled.where(scaled >= scaled.topk(top_k).values[-1], -float("inf"))
    probabilities = scaled.softmax(-1)
    probabilities = probabilities.where(probabilities >= min_p * probabilities.max(), 0.0)
    ordered, order = probabilities.sort(descending=True, stable=True)
    is_kept = (ordered.cumsum(0) - ordered < top_p * ordered.sum()) | (top_p >= 1)
    running = torch.zeros_like(ordered).scatter_(0, order, ordered.where(is_kept, 0.0)).cumsum(0)
    return int(torch.searchsorted(running, number * running[-1:], right=True).clamp(max=len(running) - 1))


SETTINGS = [
    (temperature, top_k, top_p, min_p)
    for temperature in (0.7, 1.0)
    for top_k in (0, 1, 50, 3000)
    for top_p in (0.3, 0.95, 1.0)
    for min_p in (0.0, 0.02)
]


def check_sampling() -> None:
    for dtype in TOLERANCE:
        for rows, vocab_size in ((1, 92544), (256, 151936), (3, 1000)):
            logits = random(rows, vocab_size, dtype=dtype)
            if not torch.equal(sampling.argmax(logits), first_largest(logits)):
                raise SystemExit(f"argmax: wrong for {rows} x {vocab_size} of {dtype}")
    for vocab_size, spread, dtype in (
        (92544, 1.0, torch.float32),
        (151936, 4.0, torch.bfloat16),
        (2000, 0.01, torch.float32),
    ):
        logits = random(len(SETTINGS), vocab_size).mul(spread).to(dtype)
        numbers = torch.rand(len(SETTINGS), dtype=torch.float64, device=DEVICE)
        columns = [torch.tensor(column, device=DEVICE) for column in zip(*SETTINGS, strict=True)]
        drawn = sampling.draw(logits, *columns, numbers).tolist()
        again = sampling.draw(logits, *columns, numbers).tolist()
        expected = [expected_draw(*row) for row in zip(logits, SETTINGS, numbers.tolist(), strict=True)]
        wrong = [SETTINGS[i] for i, (a, b) in enumerate(zip(drawn, expected, strict=True)) if a != b]
        print(
            f"draw {vocab_size} spread {spread} {dtype}: {len(drawn) - len(wrong)} of {len(drawn)} as by definition {wrong}"
        )
        if (
            len(wrong) > len(drawn) // 16 or drawn != again
        ):  # a number next to a border of two tokens may fall either way
            raise SystemExit("draw: too many wrong tokens, or not the same ones twice")


def first_largest(logits: Tensor) -> Tensor:
    is_largest = logits == logits.amax(dim=-1, keepdim=True)
    return is_largest.int().argmax(dim=-1)


def check_affine() -> None:
    """Every kind of group in bfloat16, and the other types for one of them."""
    kinds = [(bits, group, torch.bfloat16) for bits in (4, 8) for group in (16, 32, 64, 128)]
    for bits, group, dtype in [*kinds, (4, 32, torch.float16), (4, 32, torch.float32)]:
        w = packed_weight(777, 1152, bits, group)
        dense = affine_twin._dense(*affine.unpack(w), 8, torch.float32)
        name = f"affine {bits} bits, groups of {group}, {dtype}"
        check_close(name, affine.dequantize(w, dtype), dense, TOLERANCE[dtype])
        for rows in (1, 5, 64, 65):
            x, bias, residual = (random(*shape, dtype=dtype) for shape in ((rows, 1152), (777,), (rows, 777)))
            expected = x.double() @ dense.double().t() + bias.double() + residual.double()
            check_close(name, affine.linear(x, w, bias=bias, residual=residual), expected, 2 * TOLERANCE[dtype])


def check_experts() -> None:
    channels, size = 512, 256
    gate_up, down = random(EXPERTS, 2 * size, channels) / 16, random(EXPERTS, channels, size) / 16
    packed = packed_weight(EXPERTS * 2 * size, channels), packed_weight(EXPERTS * channels, size)
    for tokens in (1, 7, 64, 300, 3000):
        x, (weights, experts) = random(tokens, channels), routing(tokens)
        for clamp in (None, 2.0):
            wide = moe_twin.routed_mlp(x.float(), weights, experts, gate_up.float(), down.float(), "silu", clamp=clamp)
            out = moe.routed_mlp(x, weights, experts, gate_up, down, "silu", clamp=clamp)
            check_close(f"experts of {tokens}", out, wide, 3e-2)
        dense = [affine.dequantize(w, torch.float32).unflatten(0, (EXPERTS, -1)) for w in packed]
        wide = moe_twin.routed_mlp(x.float(), weights, experts, *dense, "silu")
        check_close(
            f"affine experts of {tokens}", moe.routed_mlp_affine(x, weights, experts, *packed, "silu"), wide, 3e-2
        )


def routing(tokens: int) -> tuple[Tensor, Tensor]:
    weights, experts = torch.rand(tokens, EXPERTS, device=DEVICE).topk(CHOICES, dim=-1)
    return weights / weights.sum(-1, keepdim=True), experts


# Times


def time_rows(device: Device) -> Iterator[Figure]:
    for model, (channels, size, _) in MODELS.items():
        weight = random(channels)
        for rows in ROWS:
            count = copies_for(2 * rows * channels)
            xs = [random(rows, channels) for _ in range(count)]
            num_bytes = 2 * rows * channels
            calls: list[Call] = [lambda x=x, w=weight: rms_norm(x, w, 1e-5) for x in xs]
            yield device.time(f"rms_norm {model} T={rows}", calls, 2 * num_bytes)
            calls = [lambda x=x, r=xs[0], w=weight: add_rms_norm(x, r, w, 1e-5) for x in xs]
            yield device.time(f"add_rms_norm {model} T={rows}", calls, 4 * num_bytes)
            both = [random(rows, 2 * size) for _ in range(copies_for(4 * rows * size))]
            calls = [lambda x=x: gated_activation(x, "silu") for x in both]
            yield device.time(f"gated_activation {model} T={rows}", calls, 6 * rows * size)


def time_sampling(device: Device) -> Iterator[Figure]:
    for model, (_, _, vocab_size) in MODELS.items():
        for rows in (1, 8, 64, 256):
            for dtype in (torch.bfloat16, torch.float32):
                logits = 3 * random(rows, vocab_size, dtype=dtype)
                num_bytes = logits.numel() * logits.element_size()
                name = f"{model} {str(dtype)[6:]} R={rows}"
                yield device.time(f"argmax {name}", [lambda x=logits: sampling.argmax(x)], num_bytes)
                yield device.time(f"torch argmax {name}", [lambda x=logits: x.argmax(-1)], num_bytes)
                for what, setting in {
                    "plain": (1.0, 0, 1.0, 0.0),
                    "top_p 0.8": (1.0, 0, 0.8, 0.0),
                    "top_k 40 top_p 0.8": (0.8, 40, 0.8, 0.0),
                }.items():
                    columns = [torch.tensor([value] * rows, device=DEVICE) for value in setting]
                    numbers = torch.rand(rows, dtype=torch.float64, device=DEVICE)
                    call = [lambda x=logits, c=columns, u=numbers: sampling.draw(x, *c, u)]
                    yield device.time(f"draw {what} {name}", call, num_bytes)


def time_affine(device: Device) -> Iterator[Figure]:
    for model, (channels, size, _) in MODELS.items():
        for n, k in ((2 * size, channels), (channels, size), (channels, channels)):
            w = packed_weight(n, k)
            weights = [w, *(packed_weight(n, k) for _ in range(copies_for(w.num_bytes) - 1))]
            written = 2 * n * k
            calls: list[Call] = [lambda w=w: affine.dequantize(w, torch.bfloat16) for w in weights]
            standard = affine._DEQUANTIZE_WARPS, affine._DEQUANTIZE_BLOCK
            for warps, block in ((4, 128), (8, 256), (16, 512), (4, 512), (8, 1024)):
                affine._DEQUANTIZE_WARPS, affine._DEQUANTIZE_BLOCK = warps, block
                yield device.time(f"dequantize {n} x {k} {warps} warps, {block}", calls, w.num_bytes + written)
            affine._DEQUANTIZE_WARPS, affine._DEQUANTIZE_BLOCK = standard
            for rows in (1, 8, 64, 256):
                x = random(rows, k)
                calls = [lambda w=w, x=x: affine.linear(x, w) for w in weights]
                yield device.time(f"affine.linear {model} {n} x {k} M={rows}", calls, w.num_bytes, 2.0 * rows * n * k)


def time_experts(device: Device) -> Iterator[Figure]:
    channels, size = 4096, EXPERT_SIZE
    gate_up, down = random(EXPERTS, 2 * size, channels) / 64, random(EXPERTS, channels, size) / 64
    packed = packed_weight(EXPERTS * 2 * size, channels), packed_weight(EXPERTS * channels, size)
    for tokens in ROWS:
        x, (weights, experts) = random(tokens, channels), routing(tokens)
        used = len(experts.unique())
        flops = 2.0 * tokens * CHOICES * 3 * size * channels
        plain: list[Call] = [lambda a=(x, weights, experts): moe.routed_mlp(*a, gate_up, down, "silu")]
        yield device.time(f"experts bf16 T={tokens}", plain, used * 6.0 * size * channels, flops)
        quantized: list[Call] = [lambda a=(x, weights, experts): moe.routed_mlp_affine(*a, *packed, "silu")]
        num_bytes = used / EXPERTS * sum(w.num_bytes for w in packed)
        yield device.time(f"experts 4 bits T={tokens}", quantized, num_bytes, flops)


PARTS: dict[str, tuple[Callable[[], None], Callable[[Device], Iterator[Figure]]]] = {
    "rows": (check_rows, time_rows),
    "sampling": (check_sampling, time_sampling),
    "affine": (check_affine, time_affine),
    "experts": (check_experts, time_experts),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--check-only", action="store_true", help="no times")
    args = parser.parse_args()
    parts = PARTS if args.only is None else {args.only: PARTS[args.only]}
    torch.manual_seed(0)
    start = time.perf_counter()
    for name, (check, _) in parts.items():
        check()
        print(f"{name}: correct, {time.perf_counter() - start:.0f} s", flush=True)
    if args.check_only:
        return
    device = Device()
    print(
        f"{torch.cuda.get_device_name()}: {device.bytes_per_s / 1e9:.0f} GB/s, {device.flops_per_s / 1e12:.0f} TFLOP/s"
    )
    print(f"{'':58s} {'us':>10s} {'GB/s':>9s} {'floor us':>10s} {'of floor':>8s}")
    figures = [figure for _, measure in parts.values() for figure in measure(device)]
    print(f"{time.perf_counter() - start:.0f} s")
    if args.out is not None:
        report = {
            "device": torch.cuda.get_device_name(),
            "bytes_per_s": device.bytes_per_s,
            "flops_per_s": device.flops_per_s,
            "figures": [asdict(figure) for figure in figures],
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
