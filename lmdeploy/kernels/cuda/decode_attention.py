"""One new token per request in CUDA C++, from its row of q, k and v to its attention. See decode_attention.cu."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmdeploy.kernels import invariant
from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.cuda.driver import Kernel
from lmdeploy.kernels.cuda.skinny_gemm import arch, is_available
from lmdeploy.kernels.reference.quantized_cache import QuantizedBlocks
from lmdeploy.kernels.spec import AttentionSpec

if TYPE_CHECKING:
    from lmdeploy.kernels.reference.attention import Blocks
    from lmdeploy.kernels.triton.decode_attention import Work

MIN_SPLIT, WHOLE = 512, 1024  # tokens of a split at least; a shorter request is not split
FEW_ITEMS, MANY_ITEMS = 8, 256  # requests x key-value heads
_PLAIN, _INT8, _INT4 = range(3)
_DIMS = {_PLAIN: (64, 80, 96, 112, 128), _INT8: (64, 128), _INT4: (64, 128)}
_STATIC_SHARED_BYTES = 7 << 10  # of a block at most, what the driver takes included
_DATA_CENTER = (9, 10)  # majors with clusters and the memory for as many tiles in flight as the first two shapes have


@dataclass(frozen=True)
class Shape:
    """Warps of a block, tiles in flight of a warp, blocks of a multiprocessor, blocks that share a split of a request.

    min_split, whole: tokens of a split at least; requests of up to `whole` tokens are not split.
    """

    warps: int
    stages: int
    blocks_per_sm: int
    cluster: int = 1
    min_split: int = MIN_SPLIT
    whole: int = WHOLE


# By the keys' format, for few, for some and for many requests x key-value heads.
_SHAPES = {
    _PLAIN: (Shape(2, 4, 2, 8, 2048, 2048), Shape(8, 2, 1), Shape(4, 2, 2)),
    _INT8: (Shape(2, 4, 4, 8, 2048, 2048), Shape(8, 2, 2), Shape(4, 2, 4)),
    _INT4: (Shape(2, 4, 4, 8, 2048, 2048), Shape(8, 4, 2), Shape(4, 3, 4)),
}


@dataclass(frozen=True)
class Variant:
    """Everything that the compiled kernel depends on."""

    dim: int
    group: int
    kv_heads: int
    block_size: int
    is_half: bool
    k_form: int
    v_form: int
    k_piece: int
    v_piece: int
    rotary_dim: int
    interleaved: bool
    has_norm: bool
    has_clip: bool
    has_logn: bool
    is_apart: bool
    shape: Shape

    def macros(self) -> dict[str, object]:
        shape = self.shape
        return {
            "D": self.dim, "GROUP": self.group, "KV_HEADS": self.kv_heads, "S": self.block_size,
            "FP16": int(self.is_half), "KF": self.k_form, "VF": self.v_form, "KPIECE": self.k_piece,
            "VPIECE": self.v_piece, "KPIECE_SCALE": f"{self.k_piece**-0.5!r}f",
            "VPIECE_SCALE": f"{self.v_piece**-0.5!r}f", "R": self.rotary_dim, "INTERLEAVED": int(self.interleaved),
            "NORM": int(self.has_norm), "CLIP": int(self.has_clip), "LOGN": int(self.has_logn), "WARPS": shape.warps,
            "STAGES": shape.stages, "MINB": shape.blocks_per_sm, "CL": shape.cluster, "APART": int(self.is_apart),
        }  # fmt: skip

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        ring, merge, parts = shared_parts(self.dim, self.group, self.k_form, self.v_form, self.shape)
        return parts + (ring + merge if self.is_apart else max(ring, merge))


def shared_parts(dim: int, group: int, k_form: int, v_form: int, shape: Shape) -> tuple[int, int, int]:
    """Bytes of a block's tiles in flight, of its warps' sums, and of what other blocks of its team send it."""
    key, value = ((2 * dim, dim, dim // 2)[form] for form in (k_form, v_form))
    key += 16 if k_form == _PLAIN else 64 if k_form == _INT8 and dim % 128 == 0 else 0
    tile = 16 * (key + value + 16) + (0 if k_form == _PLAIN else 128)
    cluster, vector = shape.cluster, (dim + 4) * 4
    parts = shape.warps * cluster * -(-group // cluster) * vector if cluster > 1 else 0
    return shape.warps * shape.stages * tile, shape.warps * group * vector, parts


def supports(spec: AttentionSpec, keys: Blocks, values: Blocks, dtype: torch.dtype, rotary_dim: int) -> bool:
    """Whether this kernel computes such a layer: no window, cap, bias or sink, and heads of a size that it knows."""
    is_plain = spec.window is None and spec.softcap is None and spec.alibi_slopes is None and spec.sinks is None
    forms = _form(keys), _form(values)
    if (
        not is_plain
        or None in forms
        or spec.head_dim != spec.value_dim
        or (_PLAIN in forms and forms != (_PLAIN, _PLAIN))
        or rotary_dim % 8
        or any(weight is not None and weight.dtype != dtype for weight in (spec.q_norm, spec.k_norm))
    ):
        return False
    codes = keys if isinstance(keys, Tensor) else keys.codes
    if codes.stride(0) * codes.element_size() >= 1 << 31:  # the kernel takes the bytes of a block as an int
        return False
    has_size = all(spec.head_dim in _DIMS[form] for form in forms if form is not None)
    group = spec.num_heads // spec.num_kv_heads
    return has_size and group <= 16 and codes.shape[2] % 16 == 0 and codes.data_ptr() % 16 == 0 and is_available()


def rope_store_attend(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Blocks,
    values: Blocks,
    block_tables: Tensor,
    work: Work,
    spec: AttentionSpec,
    *,
    may_overlap: bool,
    shape: Shape | None = None,
) -> Tensor:
    """One token per request: qkv [B, (H + 2 Hkv) * D], rows contiguous -> [B, H * D].

    cos, sin: [B, R / 2] float32. keys, values: [NB, Hkv, S, D] or quantized; the new token is written to the place that its
    request's block table and length name. may_overlap: since `work`, block tables, cos, sin and older keys and values were
    written, some kernel has been launched that waited for all before it; else this one is launched so.
    """
    variant = variant_of(qkv, 0 if cos is None else 2 * cos.shape[-1], keys, values, spec, shape)
    k, k_params = _parts(keys)
    v, v_params = _parts(values)
    batch, heads, kv_heads = len(qkv), spec.num_heads, spec.num_kv_heads
    scratch, size, cluster = work.scratch, k.element_size(), variant.shape.cluster
    most = batch * (scratch.entries.shape[0] // scratch.counters.shape[0]) * kv_heads
    teams = min(most, variant.shape.blocks_per_sm * _properties(qkv.device).multi_processor_count // cluster)
    out = torch.empty(batch, heads * spec.head_dim, dtype=qkv.dtype, device=qkv.device)
    _kernel(variant, may_overlap)(
        teams * cluster,
        (
            qkv, cos, sin, spec.q_norm, spec.k_norm, k, v, k_params, v_params, block_tables, scratch.entries,
            scratch.total, out, scratch.partials, scratch.stats, scratch.counters, qkv.stride(0), block_tables.stride(0),
            k.stride(0) * size, k.stride(1) * size, v.stride(0) * size, v.stride(1) * size,
            k_params.stride(0), k_params.stride(1), v_params.stride(0), v_params.stride(1),
            spec.scale * math.log2(math.e), float(spec.qk_norm_eps), float(spec.qk_norm_offset), float(spec.clip or 0.0),
            math.log(spec.logn_length) if spec.logn_length else 1.0,
        ),
    )  # fmt: skip
    return out


def variant_of(
    qkv: Tensor, rotary_dim: int, keys: Blocks, values: Blocks, spec: AttentionSpec, shape: Shape | None
) -> Variant:
    """The compiled form for such a layer and as many requests as qkv has rows."""
    k_form, v_form = _form(keys), _form(values)
    assert k_form is not None
    assert v_form is not None
    group, shape = spec.num_heads // spec.num_kv_heads, shape or choose_shape(keys, spec, len(qkv))
    room = _properties(qkv.device).shared_memory_per_multiprocessor // shape.blocks_per_sm - _STATIC_SHARED_BYTES
    return Variant(
        dim=spec.head_dim,
        group=group,
        kv_heads=spec.num_kv_heads,
        block_size=(keys if isinstance(keys, Tensor) else keys.codes).shape[2],
        is_half=qkv.dtype == torch.float16,
        k_form=k_form,
        v_form=v_form,
        k_piece=_piece(keys, spec.head_dim),
        v_piece=_piece(values, spec.head_dim),
        rotary_dim=rotary_dim,
        interleaved=spec.interleaved,
        has_norm=spec.q_norm is not None,
        has_clip=spec.clip is not None,
        has_logn=spec.logn_length is not None,
        is_apart=sum(shared_parts(spec.head_dim, group, k_form, v_form, shape)) <= room,
        shape=shape,
    )


def choose_shape(keys: Blocks, spec: AttentionSpec, batch: int) -> Shape:
    """For so many requests: where there are few, several blocks share the work of each."""
    form, items = _form(keys), batch * spec.num_kv_heads
    assert form is not None
    few, some, many = _SHAPES[form]
    if torch.cuda.get_device_capability()[0] not in _DATA_CENTER:
        shape = many
    elif invariant.applies(batch):
        shape = some
    else:
        shape = few if items <= FEW_ITEMS else some if items <= MANY_ITEMS else many
    if spec.num_heads // spec.num_kv_heads > 8 and form != _PLAIN:  # twice the sums take twice the registers
        return replace(shape, blocks_per_sm=max(1, shape.blocks_per_sm // 2))
    return shape


def _form(blocks: Blocks) -> int | None:
    if isinstance(blocks, Tensor):
        return _PLAIN
    if blocks.format.float_type is not None:
        return None
    return _INT8 if blocks.format.bits == 8 else _INT4


def _piece(blocks: Blocks, dim: int) -> int:
    """Length of the Hadamard transforms in which vectors are stored; 1 if they are stored as they are."""
    return dim & -dim if isinstance(blocks, QuantizedBlocks) and blocks.format.is_rotated else 1


def _parts(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Codes, and params as one int32 per vector."""
    return (blocks, blocks) if isinstance(blocks, Tensor) else (blocks.codes, blocks.params.view(torch.int32)[..., 0])


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


@functools.cache
def _kernel(variant: Variant, may_overlap: bool) -> Kernel:
    return Kernel(
        nvrtc.cubin("decode_attention.cu", variant.macros(), arch()),
        "decode_attention",
        threads=variant.shape.warps * 32,
        shared_bytes=variant.shared_bytes,
        cluster=variant.shape.cluster,
        overlaps=may_overlap and torch.cuda.get_device_capability() >= (9, 0),
    )
