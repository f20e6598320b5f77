"""The decode attention kernel on a GPU, from rows of q, k and v to results: microseconds for several ways to cut it.

    python -m benchmarks.decode_attention --batch 1 64 256 --context 640 --bits 16 8 4

Times are of launches inside CUDA graphs that walk 256 MB of cache, so that the L2 cache holds none of it; as in a model,
a launch begins while the one before still runs. The floor is a read of keys, values and scales at 3.06 TB/s (one H100).
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from benchmarks.attention_kernels import CUDA, PEAK_BYTES_PER_S, big_layers, make_spec, microseconds
from lmdeploy.kernels.cuda import decode_attention as kernel
from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.cuda.decode_attention import Shape
from lmdeploy.kernels.cuda.skinny_gemm import arch
from lmdeploy.kernels.triton import decode_attention as work_list

MAX_LAYERS = 24


def shapes(usual: Shape, others: bool) -> list[Shape]:
    """The one that is chosen, and some of its neighbours."""
    if not others:
        return [usual]
    clusters = [replace(usual, cluster=size) for size in (1, 2, 4, 8) if usual.warps * size <= 32]
    depths = [replace(usual, stages=stages) for stages in (2, 3, 4)]
    halved = replace(usual, warps=max(2, usual.warps // 2), blocks_per_sm=2 * usual.blocks_per_sm)
    return list(dict.fromkeys([usual, *clusters, *depths, halved]))


def measure(heads: tuple[int, int, int], batch: int, context: int, bits: int, others: bool) -> str:
    """One line: the floor, then each shape's time."""
    spec = make_spec(*heads)
    layers, tables, step_bytes = big_layers(spec, batch, context, bits)
    layers = layers[:MAX_LAYERS]
    lengths = torch.full((batch,), context, dtype=torch.int32, device=CUDA)
    qkv = torch.randn(batch, (heads[0] + 2 * heads[1]) * heads[2], device=CUDA).bfloat16()
    cos, sin = torch.rand(2, batch, heads[2] // 2, device=CUDA)
    candidates = shapes(kernel.choose_shape(layers[0][0], spec, batch), others)
    variants = [kernel.variant_of(qkv, heads[2], *layers[0], spec, shape) for shape in candidates]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda variant: nvrtc.cubin("decode_attention.cu", variant.macros(), arch()), variants))
    floor = step_bytes / PEAK_BYTES_PER_S * 1e6
    line = f"{heads[0]:2}/{heads[1]:<2} kv {bits:2} B={batch:<4} context {context:<6} floor {floor:6.1f} us |"
    for shape in candidates:
        scratch = work_list.make_scratch(batch, context, heads[0], heads[2], CUDA, shape.min_split, shape.whole)
        work = work_list.plan(lengths, scratch)
        us = microseconds(
            [
                lambda layer=layer, shape=shape, work=work: kernel.rope_store_attend(
                    qkv, cos, sin, *layer, tables, work, spec, may_overlap=True, shape=shape
                )
                for layer in layers
            ]
        )
        cut = (shape.warps, shape.stages, shape.blocks_per_sm, shape.cluster)
        line += f" {us:.1f} ({floor / us:.0%}) {cut}".replace(", ", ",")
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[640])
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], metavar=("H", "HKV", "D"))
    parser.add_argument("--others", action="store_true", help="measure more than the shape that is chosen")
    options = parser.parse_args()
    print("microseconds (share of the floor) (warps, tiles in flight, blocks of an SM, blocks of a team)")
    for bits in options.bits:
        for context in options.context:
            for batch in options.batch:
                print(measure(tuple(options.heads), batch, context, bits, options.others), flush=True)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
