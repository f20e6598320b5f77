"""Causal attention of prompts with Hopper's own instructions: choice of a variant and launch. See prefill_attention.cu."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.cuda.driver import Kernel
from lmdeploy.kernels.cuda.skinny_gemm import is_available
from lmdeploy.kernels.cuda.tensor_map import TensorMap
from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.kernels.triton.arrivals import counters

ARCH = "sm_90a"
KEYS = 128  # of a tile
_DIMS = (64, 128)
_QUERIES = 64  # of a warpgroup
_WIDTH = 64  # elements of a row of a tensor copy: 128 bytes, one period of the swizzle


@dataclass(frozen=True)
class Variant:
    """What one cubin is compiled for. block_size: tokens of a block."""

    dim: int
    heads: int
    kv_heads: int
    block_size: int
    is_half: bool

    @property
    def warpgroups(self) -> int:
        """Those that compute: three where their registers suffice."""
        return 3 if self.dim == 64 else 2

    @property
    def stages(self) -> int:
        """Tiles of the ring: as many as shared memory holds."""
        return 8 if self.dim == 64 else 5

    @property
    def box(self) -> int:
        """Tokens of one tensor copy."""
        return math.gcd(self.block_size, KEYS)

    def macros(self) -> dict[str, object]:
        return {
            "D": self.dim, "HEADS": self.heads, "KV_HEADS": self.kv_heads, "WGS": self.warpgroups, "S": self.block_size,
            "BOX": self.box, "STAGES": self.stages, "FP16": int(self.is_half),
        }  # fmt: skip

    def shared_bytes(self) -> int:
        """Dynamic shared memory: queries and outputs of each warpgroup, the ring, barriers, and room to align them."""
        groups, stages = self.warpgroups, self.stages
        barriers = -(-(2 * stages + 4 * groups + 4) * 8 // 32) * 32
        return 1024 + 2 * self.dim * (2 * _QUERIES * groups + KEYS * stages) + barriers + 64


@functools.cache
def is_usable() -> bool:
    """Whether this GPU and what is installed can run the kernel."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and is_available()


def supports(spec: AttentionSpec, q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether this kernel computes such a layer: no window, cap, bias or sink, and heads of a size that it knows."""
    is_plain = spec.window is None and spec.softcap is None and spec.alibi_slopes is None and spec.sinks is None
    types = {q.dtype, keys.dtype, values.dtype}
    if not is_plain or spec.scale <= 0 or spec.head_dim not in _DIMS or spec.head_dim != spec.value_dim:
        return False
    if types not in ({torch.float16}, {torch.bfloat16}) or not q.is_cuda:
        return False
    has_blocks = keys.shape[2] % 16 == 0 and q.stride(1) == spec.head_dim
    aligned = all(x.data_ptr() % 16 == 0 and all(n % 8 == 0 for n in x.stride()[:-1]) for x in (q, keys, values))
    return has_blocks and aligned and is_usable()


def prefill_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens_q: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    spec: AttentionSpec,
) -> Tensor:
    """q [T, H, D] -> [T, H, D] over blocks [NB, Hkv, S, D], all of one type.

    cu_seqlens_q: [B + 1] int32. block_tables: [B, max_blocks] int32. context_lens: [B] int32.
    """
    heads, dim = q.shape[1:]
    variant = Variant(dim, heads, spec.num_kv_heads, keys.shape[2], q.dtype == torch.float16)
    kernel, num_sms = _kernel(variant, q.device)
    batch = context_lens.shape[0]
    tiles = batch * -(-max_query_len // (_QUERIES * variant.warpgroups)) * heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kernel(
        min(tiles, num_sms),
        (
            _query_map(q.data_ptr(), q.dtype, q.shape, q.stride(0)),
            _cache_map(keys.data_ptr(), keys.dtype, keys.shape, keys.stride(), variant.box),
            _cache_map(values.data_ptr(), values.dtype, values.shape, values.stride(), variant.box),
            out, cu_seqlens_q, context_lens, block_tables, counters(q.device), batch,
            block_tables.stride(0), keys.shape[0], spec.scale * math.log2(math.e),
        ),
    )  # fmt: skip
    return out


# Maps depend on nothing but numbers: tensors that come to lie where others lay share them.
@functools.lru_cache(maxsize=1024)
def _query_map(address: int, dtype: torch.dtype, shape: torch.Size, stride: int) -> TensorMap:
    """Of [T, H, D], with the dimensions D, heads, tokens."""
    tokens, heads, dim = shape
    return TensorMap(address, dtype, (dim, heads, tokens), (2 * dim, 2 * stride), (_WIDTH, 1, _QUERIES))


@functools.lru_cache(maxsize=1024)
def _cache_map(address: int, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...], box: int) -> TensorMap:
    """Of blocks [NB, Hkv, S, D], with the dimensions D, tokens, heads, blocks."""
    blocks, heads, size, dim = shape
    steps = [2 * strides[axis] for axis in (2, 1, 0)]
    return TensorMap(address, dtype, (dim, size, heads, blocks), steps, (_WIDTH, box, 1, 1))


@functools.cache
def _kernel(variant: Variant, device: torch.device) -> tuple[Kernel, int]:
    """With the device's multiprocessors."""
    kernel = Kernel(
        nvrtc.cubin("prefill_attention.cu", variant.macros(), ARCH),
        "prefill_attention",
        threads=128 * (variant.warpgroups + 1),
        shared_bytes=variant.shared_bytes(),
    )
    return kernel, torch.cuda.get_device_properties(device).multi_processor_count
