"""Attention of one new token per request in CUDA C++: choice of a variant and launch. See decode_attention.cu."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.cuda.driver import Kernel
from lmdeploy.kernels.cuda.skinny_gemm import arch, is_available
from lmdeploy.kernels.reference.quantized_cache import QuantizedBlocks
from lmdeploy.kernels.spec import AttentionSpec

if TYPE_CHECKING:
    from lmdeploy.kernels.reference.attention import Blocks
    from lmdeploy.kernels.triton.decode_attention import Work

MIN_SPLIT, WHOLE = 512, 1024  # tokens of a split at least; a shorter request is not split
_PLAIN, _INT8, _INT4 = range(3)
_DIMS = {_PLAIN: (64, 80, 96, 112, 128), _INT8: (64, 128), _INT4: (64, 128)}


@dataclass(frozen=True)
class Shape:
    """Warps of a block, tiles in flight of a warp, blocks of a multiprocessor."""

    warps: int
    stages: int
    blocks_per_sm: int


# By the keys' format: as much in flight as shared memory holds, in enough blocks that one's end hides behind others.
SHAPES = {_PLAIN: Shape(4, 2, 3), _INT8: Shape(4, 2, 4), _INT4: Shape(4, 4, 4)}


def supports(spec: AttentionSpec, keys: Blocks, values: Blocks) -> bool:
    """Whether this kernel computes such a layer: no window, cap, bias or sink, and heads of a size that it knows."""
    is_plain = spec.window is None and spec.softcap is None and spec.alibi_slopes is None and spec.sinks is None
    forms = _form(keys), _form(values)
    if (
        not is_plain
        or None in forms
        or spec.head_dim != spec.value_dim
        or (_PLAIN in forms and forms != (_PLAIN, _PLAIN))
    ):
        return False
    codes = keys if isinstance(keys, Tensor) else keys.codes
    if codes.stride(0) * codes.element_size() >= 1 << 31:  # the kernel takes the bytes of a block as an int
        return False
    has_size = all(spec.head_dim in _DIMS[form] for form in forms if form is not None)
    group = spec.num_heads // spec.num_kv_heads
    return has_size and group <= 16 and codes.shape[2] % 16 == 0 and codes.data_ptr() % 16 == 0 and is_available()


def decode_attention(
    q: Tensor,
    keys: Blocks,
    values: Blocks,
    block_tables: Tensor,
    work: Work,
    spec: AttentionSpec,
    *,
    dtype: torch.dtype,
    shape: Shape | None = None,
) -> Tensor:
    """q [B, H, D] in the stored keys' basis -> [B, H, D] in dtype. Arguments as in kernels/triton/decode_attention.py."""
    k, k_params, k_form = _parts(keys)
    v, v_params, v_form = _parts(values)
    batch, heads, dim = q.shape
    shape = shape or SHAPES[k_form]
    piece = dim & -dim if isinstance(values, QuantizedBlocks) and values.format.is_rotated else 1
    kernel = _kernel(
        dim, heads // spec.num_kv_heads, spec.num_kv_heads, k.shape[2], k_form, v_form,
        q.dtype == torch.float16, dtype == torch.float16, piece, shape,
    )  # fmt: skip
    out = torch.empty(batch, heads, dim, dtype=dtype, device=q.device)
    scratch, size = work.scratch, k.element_size()
    kernel(
        _blocks(q.device, shape.blocks_per_sm),
        (
            q, k, v, k_params, v_params, block_tables, scratch.entries, scratch.total, out, scratch.partials,
            scratch.stats, scratch.counters, q.stride(0), block_tables.stride(0),
            k.stride(0) * size, k.stride(1) * size, v.stride(0) * size, v.stride(1) * size,
            k_params.stride(0), k_params.stride(1), v_params.stride(0), v_params.stride(1),
            spec.scale * math.log2(math.e),
        ),
    )  # fmt: skip
    return out


def _form(blocks: Blocks) -> int | None:
    if isinstance(blocks, Tensor):
        return _PLAIN
    if blocks.format.float_type is not None:
        return None
    return _INT8 if blocks.format.bits == 8 else _INT4


def _parts(blocks: Blocks) -> tuple[Tensor, Tensor, int]:
    """Codes, params as one int32 per vector, and the form."""
    form = _form(blocks)
    assert form is not None
    if isinstance(blocks, Tensor):
        return blocks, blocks, form
    return blocks.codes, blocks.params.view(torch.int32)[..., 0], form


@functools.cache
def _blocks(device: torch.device, per_sm: int) -> int:
    return per_sm * torch.cuda.get_device_properties(device).multi_processor_count


def macros_of(
    dim: int, group: int, kv_heads: int, block_size: int, k_form: int, v_form: int, is_half: bool, out_half: bool,
    piece: int, shape: Shape,
) -> dict[str, object]:  # fmt: skip
    """The macros of decode_attention.cu."""
    return {
        "D": dim, "GROUP": group, "KV_HEADS": kv_heads, "S": block_size, "KF": k_form, "VF": v_form,
        "FP16": int(is_half), "OUT_FP16": int(out_half), "PIECE": piece, "PIECE_SCALE": f"{piece**-0.5!r}f",
        "WARPS": shape.warps, "STAGES": shape.stages, "MINB": shape.blocks_per_sm,
    }  # fmt: skip


@functools.cache
def _kernel(
    dim: int, group: int, kv_heads: int, block_size: int, k_form: int, v_form: int, is_half: bool, out_half: bool,
    piece: int, shape: Shape,
) -> Kernel:  # fmt: skip
    macros = macros_of(dim, group, kv_heads, block_size, k_form, v_form, is_half, out_half, piece, shape)
    rows = [(2 * dim, dim, dim // 2)[form] for form in (k_form, v_form)]
    k_pitch = rows[0] + (16 if k_form == _PLAIN else 64 if k_form == _INT8 and dim % 128 == 0 else 0)
    stage = 16 * k_pitch + 16 * (rows[1] + 16) + (128 if k_form or v_form else 0)
    merge = shape.warps * -(-group // 8) * 8 * (dim + 4) * 4
    return Kernel(
        nvrtc.cubin("decode_attention.cu", macros, arch()),
        "decode_attention",
        threads=shape.warps * 32,
        shared_bytes=max(shape.warps * shape.stages * stage, merge),
        overlaps=torch.cuda.get_device_capability() >= (9, 0),
    )
