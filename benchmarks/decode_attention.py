"""Decode attention on a GPU, from rows of q, k and v to results: the CUDA kernel, cut in several ways, and its Triton sibling.

    python -m benchmarks.decode_attention --batch 1 64 256 --context 640 --bits 16 8 4

Every launch reads another layer, so that the L2 cache holds none of it; as in a model, it begins while the one before still
runs. The floor is a read of keys, values and scales. The sibling, which has what the CUDA kernel lacks, runs with the kernel
that rotates and stores in front of it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu import DEVICE, Limits, compile_all, copies_for, replay_us
from lmdeploy.kernels.cuda import decode_attention as kernel
from lmdeploy.kernels.cuda.decode_attention import Shape
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.kernels.triton import decode_attention as sibling
from lmdeploy.kernels.triton.rope_store import rope_store
from lmdeploy.kernels.triton.stored import Blocks
from lmdeploy.layers.context import KVCache
from lmdeploy.layers.quantized_cache import FORMATS, QuantizedKVCache
from lmdeploy.messages import QuantPolicy
from tests.kernels.triton.steps import make_spec

POLICIES = {16: None, 8: QuantPolicy.INT8, 4: QuantPolicy.INT4}
BLOCK_SIZE, MAX_LAYERS = 64, 24


def make_layers(count: int, num_blocks: int, spec: AttentionSpec, bits: int) -> list[tuple[Blocks, Blocks]]:
    """Random keys and values [NB, Hkv, S, D] of so many layers of one cache."""
    shape = (num_blocks, count, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    policy = POLICIES[bits]
    if policy is None:
        cache = KVCache(torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_())
    else:
        cache = QuantizedKVCache(
            shape, FORMATS[policy], lambda part, kind: torch.zeros(part, dtype=kind, device=DEVICE)
        )
        cache.data.random_(0, 256)
        cache.params.uniform_(0.01, 0.02)
    return [cache.layer(index) for index in range(count)]


def shapes(usual: Shape, others: bool) -> list[Shape]:
    """The one that is chosen, and some of its neighbours."""
    if not others:
        return [usual]
    clusters = [replace(usual, cluster=size) for size in (1, 2, 4, 8) if usual.warps * size <= 32]
    depths = [replace(usual, stages=stages) for stages in (2, 3, 4)]
    halved = replace(usual, warps=max(2, usual.warps // 2), blocks_per_sm=2 * usual.blocks_per_sm)
    return list(dict.fromkeys([usual, *clusters, *depths, halved]))


def measure(heads: tuple[int, int, int], batch: int, context: int, bits: int, others: bool, limits: Limits) -> str:
    """One line: the floor, then each shape's time, then the sibling's."""
    spec = make_spec(*heads)
    step_bytes = batch * context * heads[1] * 2 * (heads[2] * bits // 8 + (0 if bits == 16 else 4))
    per_request = -(-context // BLOCK_SIZE)
    layers = make_layers(copies_for(step_bytes, MAX_LAYERS), batch * per_request, spec, bits)
    tables = torch.randperm(batch * per_request, device=DEVICE).int().view(batch, per_request)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=DEVICE)
    qkv = torch.randn(batch, (heads[0] + 2 * heads[1]) * heads[2], device=DEVICE).bfloat16()
    cos, sin = torch.rand(2, batch, heads[2] // 2, device=DEVICE)
    candidates = shapes(kernel.choose_shape(layers[0][0], spec, batch), others)
    variants = [kernel.variant_of(qkv, heads[2], *layers[0], spec, shape) for shape in candidates]
    compile_all("decode_attention.cu", [variant.macros() for variant in variants])
    floor = limits.floor_us(step_bytes)
    line = f"{heads[0]:2}/{heads[1]:<2} kv {bits:2} B={batch:<4} context {context:<6} floor {floor:6.1f} us |"
    for shape in candidates:
        scratch = sibling.make_scratch(batch, context, heads[0], heads[2], DEVICE, shape.min_split, shape.whole)
        work = sibling.plan(lengths, scratch)
        us = replay_us(
            [
                lambda layer=layer, shape=shape, work=work: kernel.rope_store_attend(
                    qkv, cos, sin, *layer, tables, work, spec, may_overlap=True, shape=shape
                )
                for layer in layers
            ]
        )
        cut = (shape.warps, shape.stages, shape.blocks_per_sm, shape.cluster)
        line += f" {us:.1f} ({floor / us:.0%}) {cut}".replace(", ", ",")
    work = sibling.plan(lengths, sibling.make_scratch(batch, context, heads[0], heads[2], DEVICE))
    positions = lengths.long() - 1
    slots = tables[:, -1] * BLOCK_SIZE + positions % BLOCK_SIZE

    def run_sibling(layer: tuple[Blocks, Blocks]) -> Tensor:
        q = rope_store(qkv, cos, sin, positions, slots, *layer, spec)
        return sibling.decode_attention(q, *layer, tables, work, spec, dtype=qkv.dtype)

    us = replay_us([lambda layer=layer: run_sibling(layer) for layer in layers])
    return f"{line} | Triton {us:.1f} ({floor / us:.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[640])
    parser.add_argument("--bits", type=int, nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], metavar=("H", "HKV", "D"))
    parser.add_argument("--others", action="store_true", help="measure more than the shape that is chosen")
    options = parser.parse_args()
    limits = Limits.measure()
    print("microseconds (share of the floor) (warps, tiles in flight, blocks of an SM, blocks of a team)")
    for bits in options.bits:
        for context in options.context:
            for batch in options.batch:
                print(measure(tuple(options.heads), batch, context, bits, options.others, limits), flush=True)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
