"""Rotation, cache write and attention of one layer in one call. It knows the step's context, no module and no request."""

from __future__ import annotations

import ctypes
from struct import Struct
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, get_num_threads

from lmdeploy.kernels.cpu.build import library
from lmdeploy.kernels.cpu.packed import DTYPES
from lmdeploy.kernels.spec import AttentionSpec

if TYPE_CHECKING:
    from lmdeploy.layers.context import ForwardContext

_ATTEND = Struct("16q")  # struct AttendArgs of attention.cpp
_MAX_HEAD_DIM = 512
STEP = "cpu attention step"


class _Spec(ctypes.Structure):
    """`struct Spec` of attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "dim", "interleaved")),
        ("window", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "norm_eps", "norm_offset")),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm", "slopes", "sinks")),
        *((name, ctypes.c_int32) for name in ("q_norm_dtype", "k_norm_dtype")),
    ]


class _Step(ctypes.Structure):
    """`struct Step` of attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "requests", "table_stride", "block_size")),
        *((name, ctypes.c_void_p) for name in ("starts", "context_lens", "block_tables", "slots")),
    ]


class _Described:
    """A structure for the kernels together with the tensors whose addresses it holds."""

    def __init__(self, structure: ctypes.Structure, tensors: list[Tensor]) -> None:
        self.structure = structure
        self.tensors = tensors
        self.address = ctypes.addressof(structure)


_specs: WeakKeyDictionary[AttentionSpec, _Described] = WeakKeyDictionary()


def supports(spec: AttentionSpec, dtype: torch.dtype) -> bool:
    """Whether the kernel computes this attention for activations and a cache of this type."""
    return (
        dtype in DTYPES
        and spec.head_dim % 16 == 0
        and spec.head_dim <= _MAX_HEAD_DIM
        and spec.value_dim == spec.head_dim
        and spec.num_heads % spec.num_kv_heads == 0
        and spec.clip is None
        and spec.logn_length is None
        and not spec.alibi_unscaled
    )


def rope_store_attend(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    ctx: ForwardContext,
    spec: AttentionSpec,
) -> Tensor:
    """Per-head norms, rotation, cache write and attention of one layer: [T, (H + 2 Hkv) * D] -> [T, H * D].

    cos, sin: [T, R/2] float32. keys, values: [NB, Hkv, S, D], strided alike, written at ctx.slot_mapping (a negative
    slot is skipped). Softmax and sums in float32.
    """
    described = _specs.get(spec) or _describe_spec(spec)
    step = ctx.cache.get(STEP) or ctx.once(STEP, lambda: _describe_step(ctx, keys.shape[2]))
    tokens, width = qkv.shape
    stride, unit = qkv.stride()
    strides = keys.stride()
    if (
        width != (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        or unit != 1
        or strides[3] != 1
        or values.stride() != strides
    ):
        raise ValueError(f"qkv {tuple(qkv.shape)} or cache {tuple(keys.shape)} does not fit the attention of {spec}")
    out = torch.empty((tokens, spec.num_heads * spec.head_dim), dtype=qkv.dtype)
    tables = (0, 0, 0) if cos is None or sin is None else (cos.data_ptr(), sin.data_ptr(), cos.shape[1])
    head = (get_num_threads(), described.address, step.address, qkv.data_ptr(), DTYPES[qkv.dtype], stride)
    cache = (keys.data_ptr(), values.data_ptr(), DTYPES[keys.dtype], *strides[:3])
    library().lm_attend(_ATTEND.pack(*head, *tables, *cache, out.data_ptr()))
    return out


def _describe_spec(spec: AttentionSpec) -> _Described:
    slopes, sinks = (None if t is None else t.float().contiguous() for t in (spec.alibi_slopes, spec.sinks))
    norms = [None if t is None else t.contiguous() for t in (spec.q_norm, spec.k_norm)]
    tensors = (*norms, slopes, sinks)
    structure = _Spec(
        spec.num_heads, spec.num_kv_heads, spec.head_dim, int(spec.interleaved), spec.window or 0, spec.scale,
        spec.softcap or 0.0, spec.qk_norm_eps, spec.qk_norm_offset, *(None if t is None else t.data_ptr() for t in tensors),
        *(0 if t is None else DTYPES[t.dtype] for t in norms),
    )  # fmt: skip
    described = _Described(structure, [t for t in tensors if t is not None])
    _specs[spec] = described
    return described


def _describe_step(ctx: ForwardContext, block_size: int) -> _Described:
    numbers = [t.to(torch.int32).contiguous() for t in (ctx.cu_seqlens_q, ctx.context_lens, ctx.block_tables)]
    slots = ctx.slot_mapping.contiguous()
    tokens, requests = slots.shape[0], numbers[1].shape[0]
    structure = _Step(
        tokens, requests, numbers[2].shape[1], block_size, *(t.data_ptr() for t in numbers), slots.data_ptr()
    )
    return _Described(structure, [*numbers, slots])
