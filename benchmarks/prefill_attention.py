"""Attention of prompts on a Hopper GPU: this project's kernels beside torch's FlashAttention-2 and cuDNN's, in one table.

    python -m benchmarks.prefill_attention --out prefill.json

TFLOP/s count the products that a causal mask leaves; the floor is those at the rate of a large product. FlashAttention-2 and
cuDNN read keys and values in runs, the others blocks of 64 tokens: "own" the kernel of the usual forms, "Triton" the one that
does what it lacks, "int8" FlashAttention-2 behind a copy of a quantized cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.decode_attention import BLOCK_SIZE, make_layers
from benchmarks.gpu import DEVICE, Limits, replays_us, write
from lmdeploy.kernels.cuda import prefill_attention as own
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.kernels.triton.prefill_attention import prefill_attention
from tests.kernels.triton.steps import make_spec

SHAPES = ((32, 8, 128), (12, 2, 128), (32, 8, 64))
WORK = {  # new tokens and context of each request
    "8 x 4096": ([4096] * 8, [4096] * 8),
    "16 x 512": ([512] * 16, [512] * 16),
    "64 x 100": ([100] * 64, [100] * 64),
    "1 x 8192": ([8192], [8192]),
    "4 x 1024 behind 15360": ([1024] * 4, [16384] * 4),
    "256 behind 7936": ([256], [8192]),
    "8 x 20 behind 980": ([20] * 8, [1000] * 8),
    "ragged": ([4096, 300, 1200, 57, 2048, 900, 3000, 128], [4096, 300, 1200, 57, 2048, 900, 3000, 128]),
}
Launch = Callable[[], Tensor]


def flops_of(query_lens: list[int], context_lens: list[int], spec: AttentionSpec) -> int:
    seen = sum(n * (context - n) + n * (n + 1) // 2 for n, context in zip(query_lens, context_lens, strict=True))
    return 4 * spec.num_heads * spec.head_dim * seen


def launches(query_lens: list[int], context_lens: list[int], spec: AttentionSpec) -> dict[str, Launch]:
    """The same work for every kernel that can do it."""
    dtype, kv_heads, dim = torch.bfloat16, spec.num_kv_heads, spec.head_dim
    counts = [-(-n // BLOCK_SIZE) for n in context_lens]
    plain, quantized = (make_layers(1, sum(counts), spec, bits)[0] for bits in (16, 8))
    order = torch.randperm(sum(counts), device=DEVICE).int()
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=DEVICE)
    for row, ids in enumerate(order.split(counts)):
        tables[row, : len(ids)] = ids
    q = torch.randn(sum(query_lens), spec.num_heads, dim, device=DEVICE, dtype=dtype)
    k, v = torch.randn(2, sum(context_lens), kv_heads, dim, device=DEVICE, dtype=dtype)
    starts_q, starts_k = (
        torch.tensor([0, *n], device=DEVICE).cumsum(0, dtype=torch.int32) for n in (query_lens, context_lens)
    )
    lengths = torch.tensor(context_lens, dtype=torch.int32, device=DEVICE)
    sizes = (max(query_lens), max(context_lens))
    ragged = (starts_q, tables, lengths, *sizes, sum(context_lens), spec)
    found: dict[str, Launch] = {
        "own": lambda: own.prefill_attention(q, *plain, starts_q, tables, lengths, sizes[0], spec),
        "Triton": lambda: prefill_attention(q, *plain, *ragged, may_use_torch=False),
        "int8": partial(prefill_attention, q.half(), *quantized, *ragged, cu_seqlens_k=starts_k, dtype=dtype),
        "FA2": lambda: torch.ops.aten._flash_attention_forward(
            q, k, v, starts_q, starts_k, *sizes, 0.0, True, False, scale=spec.scale
        )[0],
    }
    if query_lens == context_lens and len(set(query_lens)) == 1:
        shape = (len(query_lens), query_lens[0], -1, dim)
        dense_q, dense_k, dense_v = (x.view(shape).transpose(1, 2) for x in (q, k, v))

        def run_cudnn() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(
                    dense_q, dense_k, dense_v, is_causal=True, enable_gqa=True
                )

        found["cuDNN"] = run_cudnn
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    limits = Limits.measure()
    rows: list[dict[str, Any]] = []
    print("heads     work                     floor us | us and TFLOP/s of each")
    for shape in SHAPES:
        spec = make_spec(*shape)
        for name, work in WORK.items():
            flops = flops_of(*work, spec)
            found = replays_us({kernel: [launch] for kernel, launch in launches(*work, spec).items()})
            floor = limits.floor_us(0, flops)
            rows.append({"shape": shape, "work": name, "floor_us": floor, "us": found})
            cells = " | ".join(f"{kernel} {us:7.1f} {flops / us / 1e6:4.0f}" for kernel, us in found.items())
            print(f"{shape[0]:2}/{shape[1]}x{shape[2]:<3} {name:24} {floor:8.1f} | {cells}", flush=True)
    write(options.out, limits, rows)


if __name__ == "__main__":
    main()
