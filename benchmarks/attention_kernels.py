"""Attention kernels on a GPU: right first, then microseconds and bytes per second for several configurations.

    python -m benchmarks.attention_kernels --out attention.json

Times are of launches inside CUDA graphs that walk more than 200 MB of cache, so that the L2 cache holds none of it. GB/s count
the bytes of keys and values with their scales; the floor is a read at 3.06 TB/s (one H100).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lmdeploy.kernels.reference import attention
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.kernels.triton import decode_attention as decode
from lmdeploy.kernels.triton.decode_attention import Config
from lmdeploy.kernels.triton.prefill_attention import prefill_attention
from lmdeploy.kernels.triton.rope_store import rope_store
from lmdeploy.kernels.triton.stored import Blocks, attention_dtype
from lmdeploy.layers.alibi import alibi_slopes
from lmdeploy.layers.context import KVCache
from lmdeploy.layers.quantized_cache import FORMATS, QuantizedKVCache
from lmdeploy.messages import QuantPolicy
from tests.kernels.triton.steps import fill, make_spec, make_step, normal, poisoned_layer, widened

CUDA = torch.device("cuda")
PEAK_BYTES_PER_S = 3.06e12
ROTATED_BYTES = 256 << 20
BLOCK_SIZE = 64
SHAPES = ((32, 8, 128), (12, 2, 128))
POLICIES = {16: None, 8: QuantPolicy.INT8, 4: QuantPolicy.INT4}
BATCHES, CONTEXTS = (1, 8, 64, 256), (512, 768, 4096)
CONFIGS = {
    16: [
        Config(64, 4, 3, 3),
        Config(64, 4, 4, 2),
        Config(64, 2, 3, 3),
        Config(64, 4, 2, 5),
        Config(32, 2, 4, 4),
        Config(32, 1, 4, 4),
        Config(32, 4, 5, 3),
        Config(128, 4, 2, 3),
        Config(128, 8, 2, 3),
    ],
    8: [
        Config(64, 4, 3, 4),
        Config(64, 4, 4, 4),
        Config(64, 2, 3, 6),
        Config(64, 2, 4, 5),
        Config(128, 4, 3, 3),
        Config(128, 4, 2, 3),
        Config(128, 8, 3, 2),
        Config(32, 1, 4, 8),
    ],
    4: [
        Config(64, 4, 3, 4),
        Config(64, 4, 5, 4),
        Config(64, 2, 4, 6),
        Config(128, 2, 4, 4),
        Config(128, 4, 3, 3),
        Config(128, 4, 4, 3),
        Config(128, 8, 3, 2),
        Config(32, 1, 5, 8),
    ],
}
MIN_SPLITS = (64, 256, 512, 1024)  # beside the default, with the first configuration
DEADLINE_S = 140


def variants() -> dict[str, AttentionSpec]:
    plain = make_spec(8, 2, 128)
    slopes, sinks = alibi_slopes(8).to(CUDA), normal(8, seed=3, device=CUDA)
    return {
        "plain": plain,
        "window": replace(plain, window=200),
        "softcap": replace(plain, softcap=1.5),
        "alibi": replace(plain, alibi_slopes=slopes * 0.01),
        "alibi unscaled": replace(plain, alibi_slopes=slopes, alibi_unscaled=True),
        "sinks": replace(plain, sinks=sinks, window=333),
        "one head each": make_spec(4, 4, 128),
        "many heads": make_spec(40, 2, 128),
        **{f"head_dim {dim}": make_spec(4, 2, dim) for dim in (64, 80, 96, 192, 256)},
        "latent": make_spec(24, 1, 576, value_dim=512),
    }


def checks() -> list[tuple[str, QuantPolicy | None, torch.dtype]]:
    """Every variant and format in bfloat16, and the plain one in the other types too."""
    cases: list[tuple[str, QuantPolicy | None, torch.dtype]] = []
    for name in variants():
        policies = [None] if name == "latent" else [None, *FORMATS] if name == "plain" else [None, QuantPolicy.INT4]
        cases += [(name, policy, torch.bfloat16) for policy in policies]
    cases += [("plain", policy, torch.float16) for policy in (None, *FORMATS)]
    return cases + [("plain", policy, torch.float32) for policy in (None, QuantPolicy.INT8)]


def check(case: tuple[str, QuantPolicy | None, torch.dtype]) -> dict[str, Any]:
    """Against the plain function in float32, in a process of its own; what differs is printed, nothing raised."""
    name, policy, dtype = case
    record: dict[str, Any] = {"variant": name, "kv": policy.name if policy else "plain", "dtype": str(dtype)[6:]}
    try:
        record |= errors(variants()[name], policy, dtype)
    except Exception as error:
        record["failure"] = f"{type(error).__name__}: {error}"[:600]
    limit = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-4}[dtype]
    limit *= 2 if policy is not None else 1
    worst = max((v for k, v in record.items() if k.startswith("error")), default=float("inf"))
    record["ok"] = worst < limit and record.get("is_repeatable", False)
    if not record["ok"]:
        print("BAD", record, flush=True)
    return record


def errors(spec: AttentionSpec, policy: QuantPolicy | None, dtype: torch.dtype) -> dict[str, Any]:
    """Largest errors of a decode step and of a ragged prefill through rope_store."""
    found: dict[str, Any] = {}
    steps = {"decode": ([1] * 5, [700, 1, 64, 3000, 129]), "prefill": ([300, 1, 64], [300, 500, 900])}
    for name, (query_lens, context_lens) in steps.items():
        blocks = sum(-(-n // BLOCK_SIZE) for n in context_lens) + 1
        ctx = make_step(query_lens, context_lens, blocks, BLOCK_SIZE, CUDA)
        keys, values = poisoned_layer(blocks, BLOCK_SIZE, spec, CUDA, dtype, policy)
        is_latent = spec.value_dim != spec.head_dim
        fill(keys, values, ctx, spec)
        heads = spec.num_heads + 2 * spec.num_kv_heads
        qkv = normal(sum(query_lens), heads * spec.head_dim, seed=1, device=CUDA, dtype=dtype)
        if is_latent:
            assert isinstance(keys, Tensor)
            values = keys[..., : spec.value_dim]
            q = qkv.view(len(qkv), heads, -1)[:, : spec.num_heads].contiguous()
            stored = q
        else:
            cos, sin = tables(spec.head_dim)
            stored = rope_store(qkv, cos, sin, ctx.positions, ctx.slot_mapping, keys, values, spec)
            q = qkv.view(len(qkv), heads, -1)[:, : spec.num_heads].float()
            q = attention.apply_rope(q, cos[ctx.positions], sin[ctx.positions], spec.interleaved)
        want = attention.paged_attention(q.float(), widened(keys), widened(values), ctx, spec)
        if name == "decode":
            scratch = decode.make_scratch(8, 4096, spec.num_heads, spec.value_dim, CUDA)
            work = decode.plan(ctx.context_lens, scratch)
            outs = [
                decode.decode_attention(stored, keys, values, ctx.block_tables, work, spec, dtype=dtype) for _ in (0, 1)
            ]
            found["is_repeatable"] = bool(torch.equal(*outs)) and int(scratch.counters.count_nonzero()) == 0
            found["error_decode"] = float((outs[0].float() - want).abs().max())
            continue
        host = (max(query_lens), max(context_lens), sum(context_lens))
        for own in (False, True):
            out = prefill_attention(
                stored, keys, values, ctx.cu_seqlens_q, ctx.block_tables, ctx.context_lens, *host, spec,
                dtype=dtype, may_use_torch=not own,
            )  # fmt: skip
            found[f"error_{'own' if own else 'prefill'}"] = float((out.float() - want).abs().max())
    return {k: (v if v == v else float("inf")) for k, v in found.items()}


def tables(dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(8192, device=CUDA)[:, None] * 1e4 ** -torch.linspace(0, 1, dim // 2, device=CUDA)
    return angles.cos(), angles.sin()


def big_layers(
    spec: AttentionSpec, batch: int, context: int, bits: int
) -> tuple[list[tuple[Blocks, Blocks]], Tensor, int]:
    """Layers of one cache that together exceed what the L2 cache could keep; block tables; bytes of one layer's step."""
    per_request = -(-context // BLOCK_SIZE)
    step_bytes = batch * context * spec.num_kv_heads * 2 * (spec.head_dim * bits // 8 + (0 if bits == 16 else 4))
    count = max(1, min(64, -(-ROTATED_BYTES // step_bytes)))
    shape = (batch * per_request, count, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    policy = POLICIES[bits]
    if policy is None:
        cache = KVCache(torch.empty(shape, dtype=torch.bfloat16, device=CUDA).normal_())
    else:
        cache = QuantizedKVCache(shape, FORMATS[policy], lambda part, kind: torch.zeros(part, dtype=kind, device=CUDA))
        cache.data.random_(0, 256)
        cache.params.uniform_(0.01, 0.02)
    table = torch.randperm(batch * per_request, device=CUDA).int().view(batch, per_request)
    return [cache.layer(index) for index in range(count)], table, step_bytes


def microseconds(launches: list[Any], replays: int = 5) -> float:
    """Of one launch, inside a graph of all of them."""
    launches[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return median(times)


def time_decode(
    bits: int, shape: tuple[int, int, int], batch: int, context: int, deadline: float
) -> list[dict[str, Any]]:
    spec = make_spec(*shape)
    layers, table, step_bytes = big_layers(spec, batch, context, bits)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=CUDA)
    query_dtype = attention_dtype(layers[0][0], torch.bfloat16)
    q = torch.randn(batch, spec.num_heads, spec.head_dim, device=CUDA, dtype=query_dtype)
    first = CONFIGS[bits][0]
    cases = [(config, decode.MIN_SPLIT) for config in CONFIGS[bits]] + [(first, size) for size in MIN_SPLITS]
    rows = []
    for config, min_split in cases:
        if time.time() > deadline:
            break
        scratch = decode.make_scratch(batch, context, spec.num_heads, spec.head_dim, CUDA, min_split)
        work = decode.plan(lengths, scratch)

        def launch(layer: tuple[Blocks, Blocks], work: decode.Work = work, config: Config = config) -> Tensor:
            return decode.decode_attention(q, *layer, table, work, spec, dtype=torch.bfloat16, config=config)

        row: dict[str, Any] = {"shape": shape, "bits": bits, "batch": batch, "context": context, "min_split": min_split}
        try:
            us = microseconds([lambda layer=layer, launch=launch: launch(layer) for layer in layers])
        except Exception as error:
            rows.append(row | asdict(config) | {"failure": str(error)[:200]})
            continue
        floor = step_bytes / PEAK_BYTES_PER_S * 1e6
        row |= {"us": us, "gb_per_s": step_bytes / us / 1e3, "floor_us": floor, "fraction": floor / us}
        rows.append(row | asdict(config))
    return rows


def compile_one(case: tuple[int, tuple[int, int, int], Config]) -> None:
    """In a process of its own, for the cache on disk."""
    bits, shape, config = case
    spec = make_spec(*shape)
    layers, table, _ = big_layers(spec, 1, 64, bits)
    work = decode.plan(
        torch.full((1,), 64, dtype=torch.int32, device=CUDA), decode.make_scratch(1, 64, shape[0], shape[2], CUDA)
    )
    dtype = attention_dtype(layers[0][0], torch.bfloat16)
    q = torch.zeros(1, spec.num_heads, spec.head_dim, device=CUDA, dtype=dtype)
    try:
        decode.decode_attention(q, *layers[0], table, work, spec, dtype=torch.bfloat16, config=config)
    except Exception as error:
        print("cannot compile", case, str(error)[:200], flush=True)


def time_rope_store(batch: int, bits: int, shape: tuple[int, int, int]) -> dict[str, Any]:
    spec = make_spec(*shape)
    layers, _, _ = big_layers(spec, batch, 512, bits)
    cos, sin = tables(spec.head_dim)
    positions = torch.randint(0, 8000, (batch,), device=CUDA)
    slots = torch.arange(batch, device=CUDA) * BLOCK_SIZE
    qkv = torch.randn(batch, (shape[0] + 2 * shape[1]) * shape[2], device=CUDA, dtype=torch.bfloat16)
    calls = [lambda layer=layer: rope_store(qkv, cos, sin, positions, slots, *layer, spec) for layer in layers]
    return {"batch": batch, "bits": bits, "shape": shape, "us": microseconds(calls)}


def time_prefill(batch: int, length: int, bits: int, shape: tuple[int, int, int], own: bool) -> dict[str, Any]:
    spec = make_spec(*shape)
    layers, table, _ = big_layers(spec, batch, length, bits)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=CUDA)
    starts = torch.arange(batch + 1, device=CUDA, dtype=torch.int32) * length
    q = torch.randn(
        batch * length, shape[0], shape[2], device=CUDA, dtype=attention_dtype(layers[0][0], torch.bfloat16)
    )
    host = (length, length, batch * length)
    us = microseconds(
        [
            lambda layer=layer: prefill_attention(
                q, *layer, starts, table, lengths, *host, spec, cu_seqlens_k=starts, dtype=torch.bfloat16,
                may_use_torch=not own,
            )
            for layer in layers[:4]
        ]
    )  # fmt: skip
    flops = 2 * batch * length * length * shape[0] * shape[2]
    return {"batch": batch, "length": length, "bits": bits, "own": own, "us": us, "tflops": flops / us / 1e6}


def report(rows: list[dict[str, Any]]) -> None:
    """A line per cell: the first configuration, then the best ones."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "us" in row:
            cells.setdefault((tuple(row["shape"]), row["bits"], row["batch"], row["context"]), []).append(row)
    print(
        "heads      bits batch   ctx  floor us | first: us  GB/s    % | best three: us % (tile,warps,stages,per SM,min split)"
    )
    for (shape, bits, batch, context), found in cells.items():
        best = sorted(found, key=lambda row: row["us"])[:3]
        line = f"{shape[0]:2}/{shape[1]:<2}x{shape[2]:<4} {bits:4} {batch:5} {context:5} {found[0]['floor_us']:9.1f} |"
        line += f" {found[0]['us']:9.1f} {found[0]['gb_per_s']:5.0f} {100 * found[0]['fraction']:4.0f} |"
        for row in best:
            setting = (row["tile"], row["num_warps"], row["num_stages"], row["programs_per_sm"], row["min_split"])
            line += f" {row['us']:.1f} {100 * row['fraction']:.0f}% {setting}".replace(", ", ",")
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", choices=["all", "check", "time"], default="all")
    options = parser.parse_args()
    begun = time.time()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "checks": [], "decode": [], "others": []}
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        cases = [(bits, shape, config) for bits in POLICIES for shape in SHAPES for config in CONFIGS[bits]]
        checked = pool.map(check, checks() if options.part != "time" else [])
        compiled = pool.map(compile_one, cases if options.part != "check" else [])
        results["checks"] = list(checked)
        correct = sum(record["ok"] for record in results["checks"])
        print(f"correct: {correct} of {len(results['checks'])} after {time.time() - begun:.0f} s", flush=True)
        list(compiled)
    if options.part != "check":
        print(f"compiled after {time.time() - begun:.0f} s", flush=True)
        for context in CONTEXTS:
            for shape in SHAPES:
                for bits in POLICIES:
                    for batch in BATCHES:
                        results["decode"] += time_decode(bits, shape, batch, context, begun + DEADLINE_S)
                        torch.cuda.empty_cache()
        report(results["decode"])
        for bits in POLICIES:
            results["others"] += [time_rope_store(batch, bits, SHAPES[0]) for batch in (1, 64, 256)]
            cases = [(8, 512, False), (1, 4096, False), (1, 4096, True)]
            results["others"] += [time_prefill(b, n, bits, SHAPES[0], own) for b, n, own in cases]
        for row in results["others"]:
            print({k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()})
    options.out.write_text(json.dumps(results, indent=1))
    print(f"{time.time() - begun:.0f} s, written to {options.out}")


if __name__ == "__main__":
    main()
