# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""One kernel from a step's projected q, k, v to rotated queries and a written cache. It attends to nothing."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.kernels.spec import AttentionSpec
from lmdeploy.kernels.triton.stored import Blocks, attention_dtype, encode, hadamard, side

HEADS_AT_ONCE = 8


def rope_store(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    slot_mapping: Tensor,
    keys: Blocks,
    values: Blocks,
    spec: AttentionSpec,
) -> Tensor:
    """Clip, per-head norms, rotation, log-n growth of the queries; K and V go into the cache. Returns q [T, H, D].

    qkv: [T, (H + 2 Hkv) * D], rows contiguous. cos, sin: [T, R / 2] float32. positions: [T] int64. slot_mapping: [T] int64,
    block * S + offset; a token below 0 writes nothing. keys, values: [NB, Hkv, S, D] or quantized. q comes in the basis in
    which the keys are stored, float16 for quantized blocks of 16-bit models, so that attention need not turn it.
    """
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    k, v = side(keys, dim), side(values, dim)
    q = qkv.new_empty(qkv.shape[0], heads, dim, dtype=attention_dtype(keys, qkv.dtype))
    at_once = min(HEADS_AT_ONCE, triton.next_power_of_2(heads))
    has_norm = spec.q_norm is not None
    grid = (qkv.shape[0], triton.cdiv(heads, at_once) + 2 * triton.cdiv(kv_heads, at_once))
    _rope_store[grid](
        qkv,
        qkv if cos is None else cos,
        qkv if sin is None else sin,
        positions,
        slot_mapping,
        q,
        k.codes,
        k.params,
        v.codes,
        v.params,
        spec.q_norm if has_norm else qkv,
        spec.k_norm if has_norm else qkv,
        qkv.stride(0),
        *k.codes.stride()[:2],
        *v.codes.stride()[:2],
        *k.params.stride()[:2],
        *v.params.stride()[:2],
        spec.clip or 0.0,
        spec.qk_norm_eps,
        spec.qk_norm_offset,
        math.log(spec.logn_length) if spec.logn_length else 0.0,
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=dim,
        DP=triton.next_power_of_2(dim),
        R=0 if cos is None else 2 * cos.shape[-1],
        INTERLEAVED=spec.interleaved,
        BLOCK_SIZE=k.codes.shape[2],
        HAS_CLIP=spec.clip is not None,
        HAS_NORM=has_norm,
        HAS_LOGN=spec.logn_length is not None,
        K_FORMAT=k.format,
        V_FORMAT=v.format,
        K_PIECE=k.piece,
        V_PIECE=v.piece,
        K_STAGES=k.piece.bit_length() - 1,
        V_STAGES=v.piece.bit_length() - 1,
        AT_ONCE=at_once,
        num_warps=4,
    )
    return q


@triton.jit
def _clipped(x, clip, HAS_CLIP: tl.constexpr):
    return tl.minimum(tl.maximum(x, -clip), clip) if HAS_CLIP else x


@triton.jit
def _turned(
    x_ptr, cos_ptr, sin_ptr, weight_ptr, token, valid, clip, eps, norm_offset,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_CLIP: tl.constexpr,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Heads at x_ptr [N, 1] clipped, normalized and rotated, [N, DP] float32, rounded to their own type at each step."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    d = tl.arange(0, DP)[None, :]
    live = valid & (d < D)
    x = _clipped(tl.load(x_ptr + d, mask=live, other=0.0).to(tl.float32), clip, HAS_CLIP)
    if HAS_NORM:
        root = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32) + norm_offset
        x = (x * root * weight).to(DTYPE).to(tl.float32)
    if R > 0:
        is_turned = d < R
        if INTERLEAVED:
            partner, frequency, is_first = d ^ 1, d // 2, d % 2 == 0
        else:
            HALF: tl.constexpr = R // 2
            partner, frequency, is_first = tl.where(d < HALF, d + HALF, d - HALF), d % HALF, d < HALF
        y = _clipped(tl.load(x_ptr + partner, mask=valid & is_turned, other=0.0).to(tl.float32), clip, HAS_CLIP)
        if HAS_NORM:
            other_weight = tl.load(weight_ptr + partner, mask=is_turned, other=0.0).to(tl.float32) + norm_offset
            y = (y * root * other_weight).to(DTYPE).to(tl.float32)
        cos = tl.load(cos_ptr + token * (R // 2) + frequency, mask=is_turned, other=1.0)
        sin = tl.load(sin_ptr + token * (R // 2) + frequency, mask=is_turned, other=0.0)
        x = (x * cos + tl.where(is_first, -y, y) * sin).to(DTYPE).to(tl.float32)
    return x


@triton.jit
def _store(
    x, codes_ptr, params_ptr, block_stride, head_stride, block_params_stride, head_params_stride, head, valid, slot,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_SIZE: tl.constexpr, FORMAT: tl.constexpr, PIECE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Rows x: [N, DP] of heads [N] into the token's place."""
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    d = tl.arange(0, DP)[None, :]
    BYTES: tl.constexpr = D // 2 if FORMAT == "int4" else D
    target = codes_ptr + block * block_stride + head[:, None] * head_stride + offset * BYTES + d
    mask = valid[:, None] & (d < BYTES)
    if FORMAT == "plain":
        tl.store(target, x.to(codes_ptr.dtype.element_ty), mask=mask)
    else:
        if PIECE > 1:
            x = hadamard(x, PIECE, STAGES)
        codes, params = encode(x, d < D, FORMAT)
        if FORMAT == "int4":
            second = tl.gather(codes, tl.broadcast_to((d + BYTES) % DP, codes.shape), 1)
            codes = codes | (second << 4)
        tl.store(target, codes.to(tl.uint8), mask=mask)
        where = params_ptr + block * block_params_stride + head * head_params_stride + offset
        tl.store(where, params, mask=valid)


@triton.jit
def _rope_store(
    qkv_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, q_ptr, k_ptr, k_params_ptr, v_ptr, v_params_ptr,
    q_norm_ptr, k_norm_ptr, token_stride, k_block_stride, k_head_stride, v_block_stride, v_head_stride,
    k_params_block_stride, k_params_head_stride, v_params_block_stride, v_params_head_stride,
    clip, eps, norm_offset, log_length,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_CLIP: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_LOGN: tl.constexpr, K_FORMAT: tl.constexpr, V_FORMAT: tl.constexpr,
    K_PIECE: tl.constexpr, V_PIECE: tl.constexpr, K_STAGES: tl.constexpr, V_STAGES: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One program a token and AT_ONCE heads of q, of k, or of v."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    Q_PARTS: tl.constexpr = (HEADS + AT_ONCE - 1) // AT_ONCE
    KV_PARTS: tl.constexpr = (KV_HEADS + AT_ONCE - 1) // AT_ONCE
    slot = tl.load(slots_ptr + token)
    lane = tl.arange(0, AT_ONCE)
    d = tl.arange(0, DP)[None, :]
    x_ptr = qkv_ptr + token * token_stride
    if part < Q_PARTS:
        head = part * AT_ONCE + lane
        valid = head < HEADS
        x = _turned(
            x_ptr + head[:, None] * D, cos_ptr, sin_ptr, q_norm_ptr, token, valid[:, None], clip, eps, norm_offset,
            D, DP, R, INTERLEAVED, HAS_CLIP, HAS_NORM,
        )  # fmt: skip
        if HAS_LOGN:
            position = tl.load(positions_ptr + token)
            growth = tl.maximum(tl.log((position + 1).to(tl.float32)) / log_length, 1.0)
            x = (x * growth).to(qkv_ptr.dtype.element_ty).to(tl.float32)
        if K_PIECE > 1:
            x = hadamard(x, K_PIECE, K_STAGES)
        target = q_ptr + (token * HEADS + head[:, None]) * D + d
        tl.store(target, x.to(q_ptr.dtype.element_ty), mask=valid[:, None] & (d < D))
    elif part < Q_PARTS + KV_PARTS:
        head = (part - Q_PARTS) * AT_ONCE + lane
        valid = head < KV_HEADS
        x = _turned(
            x_ptr + (HEADS + head[:, None]) * D, cos_ptr, sin_ptr, k_norm_ptr, token, valid[:, None], clip, eps, norm_offset,
            D, DP, R, INTERLEAVED, HAS_CLIP, HAS_NORM,
        )  # fmt: skip
        _store(
            x, k_ptr, k_params_ptr, k_block_stride, k_head_stride, k_params_block_stride, k_params_head_stride,
            head, valid & (slot >= 0), slot, D, DP, BLOCK_SIZE, K_FORMAT, K_PIECE, K_STAGES,
        )  # fmt: skip
    else:
        head = (part - Q_PARTS - KV_PARTS) * AT_ONCE + lane
        valid = head < KV_HEADS
        x = tl.load(x_ptr + (HEADS + KV_HEADS + head[:, None]) * D + d, mask=valid[:, None] & (d < D), other=0.0)
        x = _clipped(x.to(tl.float32), clip, HAS_CLIP)
        _store(
            x, v_ptr, v_params_ptr, v_block_stride, v_head_stride, v_params_block_stride, v_params_head_stride,
            head, valid & (slot >= 0), slot, D, DP, BLOCK_SIZE, V_FORMAT, V_PIECE, V_STAGES,
        )  # fmt: skip
