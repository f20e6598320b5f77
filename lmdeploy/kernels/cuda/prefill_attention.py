"""Causal attention of prompts with Hopper's own instructions: choice of a variant and launch. See prefill_attention.cu."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.cuda.driver import Kernel
from lmdeploy.kernels.cuda.skinny_gemm import is_available
from lmdeploy.kernels.cuda.tensor_map import TensorMap
from lmdeploy.kernels.spec import AttentionSpec

ARCH = "sm_90a"
KEYS = 128  # of a tile
DIMS, _TIMED_DIMS = (64, 96, 128), (64, 128)
_WIDTH = 64  # elements of a row of a tensor copy: 128 bytes, one period of the swizzle
_LAUNCHES = 256  # that may run at one time


@dataclass(frozen=True)
class Shape:
    """Warpgroups that compute, tiles of the ring, query heads of one key-value head that share a tile."""

    warpgroups: int
    stages: int
    pack: int


@dataclass(frozen=True)
class Variant:
    """What one cubin is compiled for. block_size: tokens of a block, 0 for keys and values in runs."""

    dim: int
    heads: int
    kv_heads: int
    block_size: int
    is_half: bool
    out_half: bool
    has_window: bool
    shape: Shape

    @property
    def box(self) -> int:
        """Tokens of one tensor copy."""
        return math.gcd(self.block_size, KEYS)

    def macros(self) -> dict[str, object]:
        return {
            "D": self.dim, "HEADS": self.heads, "KV_HEADS": self.kv_heads, "PACK": self.shape.pack,
            "WGS": self.shape.warpgroups, "S": self.block_size, "BOX": self.box, "STAGES": self.shape.stages,
            "FP16": int(self.is_half), "OUT_FP16": int(self.out_half), "WINDOW": int(self.has_window),
        }  # fmt: skip

    def shared_bytes(self) -> int:
        """Dynamic shared memory: queries and outputs of each warpgroup, the ring, barriers, and room to align them."""
        row = -(-self.dim // _WIDTH) * 128
        groups, stages = self.shape.warpgroups, self.shape.stages
        barriers = -(-(2 * stages + 4 * groups + 4) * 8 // 32) * 32
        return 1024 + row * (2 * 64 * groups + KEYS * stages) + barriers + 64


def shape_of(spec: AttentionSpec) -> Shape:
    """Three warpgroups where their registers suffice, and as many tiles as shared memory holds."""
    return Shape(3, 8, 1) if spec.head_dim == 64 else Shape(2, 5, 1)


@functools.cache
def is_usable() -> bool:
    """Whether this GPU and what is installed can run the kernel."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and is_available()


def supports(spec: AttentionSpec, q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether this kernel computes such a layer over blocks or runs: no cap, bias or sink, heads of a size that it knows."""
    is_plain = spec.softcap is None and spec.alibi_slopes is None and spec.sinks is None and spec.scale > 0
    types = {q.dtype, keys.dtype, values.dtype}
    if not is_plain or spec.head_dim not in DIMS or spec.head_dim != spec.value_dim:
        return False
    if types not in ({torch.float16}, {torch.bfloat16}) or not q.is_cuda:
        return False
    has_blocks = (keys.dim() == 3 or keys.shape[2] % 16 == 0) and q.stride(1) == spec.head_dim
    aligned = all(x.data_ptr() % 16 == 0 and all(n % 8 == 0 for n in x.stride()[:-1]) for x in (q, keys, values))
    return has_blocks and aligned and is_usable()


def is_faster(spec: AttentionSpec, q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether it computes the layer and was timed against torch's flash attention: blocks, no window, these heads."""
    return spec.window is None and spec.head_dim in _TIMED_DIMS and supports(spec, q, keys, values)


def prefill_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens_k: Tensor | None,
    cu_seqlens_q: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    spec: AttentionSpec,
    *,
    dtype: torch.dtype,
    shape: Shape | None = None,
) -> Tensor:
    """q [T, H, D] -> [T, H, D] in dtype, over blocks [NB, Hkv, S, D], or over runs [total, Hkv, D] that begin at cu_seqlens_k.

    cu_seqlens_q, cu_seqlens_k: [B + 1] int32. block_tables: [B, max_blocks] int32. context_lens: [B] int32.
    """
    heads, dim = q.shape[1:]
    shape = shape or shape_of(spec)
    block_size = 0 if cu_seqlens_k is not None else keys.shape[2]
    kernel, box, num_sms = _kernel(
        dim, heads, spec.num_kv_heads, block_size, q.dtype, dtype, spec.window is not None, shape, q.device
    )
    queries, batch = 64 // shape.pack, context_lens.shape[0]
    tiles = batch * -(-max_query_len // (queries * shape.warpgroups)) * (heads // shape.pack)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    kernel(
        min(tiles, num_sms),
        (
            _query_map(q.data_ptr(), q.dtype, q.shape, q.stride(0), shape.pack),
            _cache_map(keys.data_ptr(), keys.dtype, keys.shape, keys.stride(), box),
            _cache_map(values.data_ptr(), values.dtype, values.shape, values.stride(), box),
            out, cu_seqlens_q, cu_seqlens_k, context_lens, block_tables, _next_counters(q.device), batch,
            block_tables.stride(0), keys.shape[0], spec.window or 0, spec.scale * math.log2(math.e),
        ),
    )  # fmt: skip
    return out


# Maps depend on nothing but numbers: tensors that come to lie where others lay share them.
@functools.lru_cache(maxsize=1024)
def _query_map(address: int, dtype: torch.dtype, shape: torch.Size, stride: int, pack: int) -> TensorMap:
    """Of [T, H, D], with the dimensions D, heads, tokens."""
    tokens, heads, dim = shape
    return TensorMap(address, dtype, (dim, heads, tokens), (2 * dim, 2 * stride), (_WIDTH, pack, 64 // pack))


@functools.lru_cache(maxsize=1024)
def _cache_map(address: int, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...], box: int) -> TensorMap:
    """Of blocks [NB, Hkv, S, D] or runs [total, Hkv, D], with the dimensions D, tokens, heads, blocks."""
    if len(shape) == 3:
        sizes, steps = (shape[2], shape[0], shape[1], 1), (strides[0], strides[1], strides[0] * shape[0])
    else:
        sizes, steps = (shape[3], shape[2], shape[1], shape[0]), (strides[2], strides[1], strides[0])
    return TensorMap(address, dtype, sizes, [2 * n for n in steps], (_WIDTH, box, 1, 1))


_turn = itertools.count()


def _next_counters(device: torch.device) -> Tensor:
    """Tiles drawn and blocks that have ended: every launch leaves zeros, and the next ones take others, on whatever stream."""
    return _counters(device)[next(_turn) % _LAUNCHES]


@functools.cache
def _counters(device: torch.device) -> tuple[Tensor, ...]:
    return torch.zeros(_LAUNCHES, 2, dtype=torch.int32, device=device).unbind()


@functools.cache
def _kernel(
    dim: int, heads: int, kv_heads: int, block_size: int, dtype: torch.dtype, out_dtype: torch.dtype, has_window: bool,
    shape: Shape, device: torch.device,
) -> tuple[Kernel, int, int]:  # fmt: skip
    """With the tokens of one of its copies, and the device's multiprocessors."""
    halves = dtype == torch.float16, out_dtype == torch.float16
    variant = Variant(dim, heads, kv_heads, block_size, *halves, has_window, shape)
    return _load(variant), variant.box, torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _load(variant: Variant) -> Kernel:
    return Kernel(
        nvrtc.cubin("prefill_attention.cu", variant.macros(), ARCH),
        "prefill_attention",
        threads=128 * (variant.shape.warpgroups + 1),
        shared_bytes=variant.shared_bytes(),
    )
