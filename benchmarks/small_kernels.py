"""The small kernels on one NVIDIA GPU, timed: norms, activations, sampling, affine weights, experts.

    python -m benchmarks.small_kernels [--out FILE] [--only WORD]

Shapes are those of InternLM2-7B, Qwen2.5-1.5B and Mixtral-8x7B with random numbers. Times are medians of replays of a
CUDA graph that holds many launches over different buffers, so that what a step would find in memory is not found in the
cache. Floors are those of benchmarks/gpu.py. `pytest -m gpu tests/kernels/triton` checks the same kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu import DEVICE, Call, Limits, copies_for, replay_us, show, write
from lmdeploy.kernels import gated_activation, rms_norm
from lmdeploy.kernels.triton import affine, moe, sampling

MODELS = {"7B": (4096, 14336, 92544), "1.5B": (1536, 8960, 151936)}  # C, I, V
EXPERTS, CHOICES, EXPERT_SIZE = 8, 2, 14336
ROWS = (1, 8, 64, 256, 8192)
MOST_COPIES = 16

Figure = dict[str, str | float]


def figure(limits: Limits, name: str, calls: list[Call], num_bytes: float, flops: float = 0.0) -> Figure:
    """One line of the table."""
    us, floor = replay_us(calls, replays=5), limits.floor_us(num_bytes, flops)
    return {"name": name, "us": us, "gb_s": num_bytes / us / 1e3, "floor_us": floor, "of_floor": floor / us}


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def packed_weight(n: int, k: int, bits: int = 4, group: int = 128) -> affine.PackedAffine:
    q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device=DEVICE)
    scales = (0.04 * 2.0**-bits * (0.5 + torch.rand(n, k // group, device=DEVICE))).half().float()
    return affine.pack(q, scales, -scales * 2 ** (bits - 1), bits)


def routing(tokens: int) -> tuple[Tensor, Tensor]:
    weights, experts = torch.rand(tokens, EXPERTS, device=DEVICE).topk(CHOICES, dim=-1)
    return weights / weights.sum(-1, keepdim=True), experts


def time_rows(limits: Limits) -> Iterator[Figure]:
    for model, (channels, size, _) in MODELS.items():
        weight = random(channels)
        for rows in ROWS:
            num_bytes = 2 * rows * channels
            xs = [random(rows, channels) for _ in range(copies_for(num_bytes, MOST_COPIES))]
            calls: list[Call] = [lambda x=x, w=weight: rms_norm(x, w, 1e-5) for x in xs]
            yield figure(limits, f"rms_norm {model} T={rows}", calls, 2 * num_bytes)
            both = [random(rows, 2 * size) for _ in range(copies_for(4 * rows * size, MOST_COPIES))]
            calls = [lambda x=x: gated_activation(x, "silu") for x in both]
            yield figure(limits, f"gated_activation {model} T={rows}", calls, 6 * rows * size)


def time_sampling(limits: Limits) -> Iterator[Figure]:
    for model, (_, _, vocab_size) in MODELS.items():
        for rows in (1, 8, 64, 256):
            for dtype in (torch.bfloat16, torch.float32):
                logits = 3 * random(rows, vocab_size, dtype=dtype)
                num_bytes = logits.numel() * logits.element_size()
                name = f"{model} {str(dtype)[6:]} R={rows}"
                yield figure(limits, f"argmax {name}", [lambda x=logits: sampling.argmax(x)], num_bytes)
                yield figure(limits, f"torch argmax {name}", [lambda x=logits: x.argmax(-1)], num_bytes)
                for what, setting in {
                    "plain": (1.0, 0, 1.0, 0.0),
                    "top_p 0.8": (1.0, 0, 0.8, 0.0),
                    "top_k 40 top_p 0.8": (0.8, 40, 0.8, 0.0),
                }.items():
                    columns = [torch.tensor([value] * rows, device=DEVICE) for value in setting]
                    numbers = torch.rand(rows, dtype=torch.float64, device=DEVICE)
                    call = [lambda x=logits, c=columns, u=numbers: sampling.draw(x, *c, u)]
                    yield figure(limits, f"draw {what} {name}", call, num_bytes)


def time_affine(limits: Limits) -> Iterator[Figure]:
    for model, (channels, size, _) in MODELS.items():
        for n, k in ((2 * size, channels), (channels, size), (channels, channels)):
            w = packed_weight(n, k)
            weights = [w, *(packed_weight(n, k) for _ in range(copies_for(w.num_bytes, MOST_COPIES) - 1))]
            calls: list[Call] = [lambda w=w: affine.dequantize(w, torch.bfloat16) for w in weights]
            yield figure(limits, f"dequantize {n} x {k}", calls, w.num_bytes + 2 * n * k)
            for rows in (1, 8, 64, 256):
                x = random(rows, k)
                calls = [lambda w=w, x=x: affine.linear(x, w) for w in weights]
                yield figure(
                    limits, f"affine.linear {model} {n} x {k} M={rows}", calls, w.num_bytes, 2.0 * rows * n * k
                )


def time_experts(limits: Limits) -> Iterator[Figure]:
    channels, size = 4096, EXPERT_SIZE
    gate_up, down = random(EXPERTS, 2 * size, channels) / 64, random(EXPERTS, channels, size) / 64
    packed = packed_weight(EXPERTS * 2 * size, channels), packed_weight(EXPERTS * channels, size)
    for tokens in ROWS:
        x, (weights, experts) = random(tokens, channels), routing(tokens)
        used = len(experts.unique())
        flops = 2.0 * tokens * CHOICES * 3 * size * channels
        plain: list[Call] = [lambda a=(x, weights, experts): moe.routed_mlp(*a, gate_up, down, "silu")]
        yield figure(limits, f"experts bf16 T={tokens}", plain, used * 6.0 * size * channels, flops)
        quantized: list[Call] = [lambda a=(x, weights, experts): moe.routed_mlp_affine(*a, *packed, "silu")]
        num_bytes = used / EXPERTS * sum(w.num_bytes for w in packed)
        yield figure(limits, f"experts 4 bits T={tokens}", quantized, num_bytes, flops)


PARTS: dict[str, Callable[[Limits], Iterator[Figure]]] = {
    "rows": time_rows,
    "sampling": time_sampling,
    "affine": time_affine,
    "experts": time_experts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--only", choices=PARTS, help="one part")
    args = parser.parse_args()
    torch.manual_seed(0)
    limits = Limits.measure()
    rows: list[Figure] = []
    for name in [args.only] if args.only else PARTS:
        for row in PARTS[name](limits):
            rows.append(row)
            show(row)
    write(args.out, limits, rows)


if __name__ == "__main__":
    main()
