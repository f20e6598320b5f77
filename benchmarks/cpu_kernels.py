"""Time the CPU kernels on the shapes of a small language model, and whole synthetic steps of it.

    python benchmarks/cpu_kernels.py [--json] [--threads N] [--dense] [--seconds S] [--target native|avx2|portable]

The model is a 30-layer one of hidden size 576 (that of SmolLM2-135M) with random weights: 4-bit groups of 32 with a
float minimum, and an 8-bit output head. Floors: bytes over the read bandwidth and operations over the integer peak,
both measured at the start. Every time is the least of many runs, because other programs share the machine.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.bench.roofline import least_seconds, measure_read_bandwidth
from lmdeploy.kernels import cpu
from lmdeploy.kernels.cpu.build import use_target
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.layers.context import ForwardContext, KVCache

RUNS = 6  # of each measurement at least
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS, BLOCK = 576, 1536, 9, 3, 64, 49152, 30, 64
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM


def random_weight(n: int, k: int, bits: int) -> cpu.PackedAffine:
    q = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scales = (0.02 * torch.rand(n, k // 32) / 2 ** (bits - 4) + 1e-4).half().float()
    mins = -128 * scales if bits == 8 else (-8 * scales + 1e-3 * torch.randn_like(scales)).half().float()
    return cpu.pack(q, scales, mins, bits)


def context(batch: int, queries: int, past: int, dtype: torch.dtype, layers: int) -> ForwardContext:
    """A step of `batch` requests with `queries` new tokens each behind `past` cached ones."""
    total = queries + past
    blocks = -(-total // BLOCK)
    table = torch.randperm(batch * blocks).to(torch.int32).view(batch, blocks)
    positions = torch.arange(past, total)
    slots = table.long()[:, positions // BLOCK] * BLOCK + positions % BLOCK
    data = torch.empty(batch * blocks, layers, 2, KV_HEADS, BLOCK, HEAD_DIM, dtype=dtype)
    cpu.prefer_huge_pages(data)
    data.normal_()
    lens = torch.full((batch,), total, dtype=torch.int32)
    starts = torch.arange(batch + 1, dtype=torch.int32) * queries
    return ForwardContext(
        positions.repeat(batch), starts, lens, table, slots.flatten(), lens, KVCache(data),
        [queries] * batch, [total] * batch,
    )  # fmt: skip


class Model:
    """The synthetic model; `step` is what an engine's step does, less scheduling and sampling."""

    def __init__(self, layers: int, dense: bool) -> None:
        self.dense = dense
        self.layers = [
            (self.weight(QKV, HIDDEN), self.weight(HIDDEN, HEADS * HEAD_DIM), self.weight(2 * INTERMEDIATE, HIDDEN),
             self.weight(HIDDEN, INTERMEDIATE), torch.ones(HIDDEN).bfloat16(), torch.ones(HIDDEN).bfloat16())
            for _ in range(layers)
        ]  # fmt: skip
        self.head = self.weight(VOCAB, HIDDEN, bits=8)
        self.norm = torch.ones(HIDDEN).bfloat16()
        self.spec = AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, HEAD_DIM**-0.5)

    def weight(self, n: int, k: int, bits: int = 4) -> cpu.PackedAffine | Tensor:
        return (0.02 * torch.randn(n, k)).bfloat16() if self.dense else random_weight(n, k, bits)

    @property
    def num_bytes(self) -> int:
        weights = [w for layer in self.layers for w in layer[:4]] + [self.head]
        return sum(2 * w.numel() if isinstance(w, Tensor) else w.num_bytes for w in weights)

    def linear(self, x: Tensor, w, norm=None, residual=None, out_dtype=None) -> Tensor:
        if not self.dense:
            return cpu.linear(x, w, norm_weight=norm, norm_eps=1e-5, residual=residual, out_dtype=out_dtype)
        if cpu.can_multiply_dense(w, x.shape[0]):
            return cpu.dense_linear(x, w, norm_weight=norm, norm_eps=1e-5, residual=residual, out_dtype=out_dtype)
        y = torch.nn.functional.linear(x if norm is None else cpu.rms_norm(x, norm, 1e-5), w)
        return y if residual is None else y + residual

    def mlp(self, x: Tensor, gate_up, down, norm: Tensor) -> Tensor:
        if not self.dense:
            return cpu.gated_mlp(x, gate_up, down, "silu", norm_weight=norm, norm_eps=1e-5, residual=x)
        return self.linear(cpu.gated_activation(self.linear(x, gate_up, norm), "silu"), down, residual=x)

    def step(self, ids: Tensor, ctx: ForwardContext, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.cache.clear()
        x = self.head[ids] if isinstance(self.head, Tensor) else cpu.embed(ids, self.head, torch.bfloat16)
        for index, (qkv_proj, o_proj, gate_up, down, norm1, norm2) in enumerate(self.layers):
            qkv = self.linear(x, qkv_proj, norm1)
            keys, values = ctx.kv_cache.layer(index)
            attended = cpu.rope_store_attend(qkv, cos, sin, keys, values, ctx, self.spec)
            x = self.linear(attended, o_proj, residual=x)
            x = self.mlp(x, gate_up, down, norm2)
        last = x[ctx.cu_seqlens_q[1:].long() - 1]
        return self.linear(last, self.head, self.norm, out_dtype=torch.float32)


@dataclass
class Row:
    """One measurement: what, its time, and the least time that the machine allows."""

    name: str
    microseconds: float
    floor_microseconds: float
    unit: str
    rate: float

    def text(self) -> str:
        share = self.floor_microseconds / self.microseconds
        return (
            f"{self.name:<40}{self.microseconds:>12.1f} us {self.rate:>10.1f} {self.unit:<6}{share:>7.0%} of the floor"
        )


@dataclass
class Machine:
    """Bytes and 8-bit operations per second."""

    bandwidth: float
    peak: float

    def row(self, name: str, seconds: float, num_bytes: float, operations: float) -> Row:
        memory, compute = num_bytes / self.bandwidth, operations / self.peak
        rate, unit = (num_bytes, "GB/s") if memory > compute else (operations, "GOP/s")
        return Row(name, 1e6 * seconds, 1e6 * max(memory, compute), unit, rate / seconds / 1e9)


def kernel_rows(machine: Machine, budget_s: float) -> list[Row]:
    """Every linear shape at several batch sizes. Copies of the weight are cycled so that it comes from memory."""
    rows = []
    shapes = {"qkv": (QKV, HIDDEN, 4), "o": (HIDDEN, HIDDEN, 4), "head": (VOCAB, HIDDEN, 8)}
    for name, (n, k, bits) in shapes.items():
        copies = [random_weight(n, k, bits) for _ in range(2 if name == "head" else 120)]
        for tokens in (1, 8) if name == "head" else (1, 8, 64, 512):
            x, turn = torch.randn(tokens, k).bfloat16(), iter(range(1 << 30))
            seconds = least_seconds(lambda: cpu.linear(x, copies[next(turn) % len(copies)]), RUNS, budget_s)  # noqa: B023
            rows.append(machine.row(f"{name} {n}x{k} M={tokens}", seconds, copies[0].num_bytes, 2.0 * n * k * tokens))
    pairs = [(random_weight(2 * INTERMEDIATE, HIDDEN, 4), random_weight(HIDDEN, INTERMEDIATE, 4)) for _ in range(40)]
    for tokens in (1, 8, 64, 512):
        x, turn = torch.randn(tokens, HIDDEN).bfloat16(), iter(range(1 << 30))
        seconds = least_seconds(lambda: cpu.gated_mlp(x, *pairs[next(turn) % len(pairs)], "silu"), RUNS, budget_s)  # noqa: B023
        num_bytes = sum(w.num_bytes for w in pairs[0])
        rows.append(machine.row(f"gated_mlp M={tokens}", seconds, num_bytes, 6.0 * HIDDEN * INTERMEDIATE * tokens))
    return rows + attention_rows(machine, budget_s)


def attention_rows(machine: Machine, budget_s: float) -> list[Row]:
    rows = []
    spec = AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, HEAD_DIM**-0.5)
    for batch, queries, past in ((1, 1, 511), (8, 1, 511), (1, 1, 4095), (1, 512, 0), (1, 512, 1536)):
        ctx = context(batch, queries, past, torch.bfloat16, 30 if batch * past < 5000 else 4)
        qkv = torch.randn(batch * queries, QKV).bfloat16()
        cos, sin = torch.ones(batch * queries, HEAD_DIM // 2), torch.zeros(batch * queries, HEAD_DIM // 2)
        turn, layers = iter(range(1 << 30)), ctx.kv_cache.data.shape[1]

        def run() -> Tensor:
            keys, values = ctx.kv_cache.layer(next(turn) % layers)  # noqa: B023
            return cpu.rope_store_attend(qkv, cos, sin, keys, values, ctx, spec)  # noqa: B023

        num_bytes = 2.0 * 2 * batch * (queries + past) * KV_HEADS * HEAD_DIM
        operations = 4.0 * HEADS * HEAD_DIM * batch * queries * (past + (queries + 1) / 2)
        half_rate = Machine(machine.bandwidth, machine.peak / 2)  # bfloat16 products
        name = f"attention B={batch} new={queries} cached={past}"
        rows.append(half_rate.row(name, least_seconds(run, RUNS, budget_s), num_bytes, operations))
    return rows


def step_rows(machine: Machine, budget_s: float, dense: bool) -> list[Row]:
    """Whole steps; the rate is tokens per second."""
    model = Model(LAYERS, dense)
    weights = HIDDEN * (QKV + HIDDEN + 3 * INTERMEDIATE) * LAYERS
    rows = []
    for name, batch, queries, past in (
        ("decode", 1, 1, 63), ("decode", 1, 1, 511), ("decode", 8, 1, 63), ("decode", 8, 1, 511), ("prefill", 1, 512, 0),
    ):  # fmt: skip
        ctx = context(batch, queries, past, torch.bfloat16, LAYERS)
        tokens = batch * queries
        ids, cos, sin = torch.randint(0, VOCAB, (tokens,)), torch.ones(tokens, 32), torch.zeros(tokens, 32)
        seconds = least_seconds(lambda: model.step(ids, ctx, cos, sin), RUNS, 4 * budget_s)  # noqa: B023
        kv_bytes = 4.0 * batch * past * KV_HEADS * HEAD_DIM * LAYERS
        operations = 2.0 * weights * tokens + 2.0 * VOCAB * HIDDEN * batch
        row = machine.row(
            f"step {name} B={batch} new={queries} cached={past}", seconds, model.num_bytes + kv_bytes, operations
        )
        rows.append(Row(row.name, row.microseconds, row.floor_microseconds, "tok/s", tokens / seconds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dense", action="store_true", help="bfloat16 weights in the whole steps")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each measurement")
    parser.add_argument("--target", choices=("native", "avx2", "portable"), default="native")
    parser.add_argument("--peak-gops", type=float, help="8-bit operations per second, for the floor; 470 a thread")
    parser.add_argument("--only", choices=("kernels", "steps"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    peak = 1e9 * (args.peak_gops or 470 * args.threads)
    with use_target(args.target) if args.target != "native" else nullcontext(), torch.inference_mode():
        machine = Machine(measure_read_bandwidth(torch.device("cpu")), peak)
        header = f"{cpu.instruction_set()}, {args.threads} threads, reads {machine.bandwidth / 1e9:.1f} GB/s"
        rows = [] if args.only == "steps" else kernel_rows(machine, args.seconds)
        rows += [] if args.only == "kernels" else step_rows(machine, args.seconds, args.dense)
    if args.json:
        print(json.dumps({"machine": header, "rows": [vars(row) for row in rows]}))
        return
    print(header)
    for row in rows:
        print(row.text())


if __name__ == "__main__":
    main()
