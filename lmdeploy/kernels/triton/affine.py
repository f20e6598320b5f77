# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Linear layers over affine 4 and 8-bit weights: few rows multiply integers, many a 16-bit copy made for the product.

The functions and their arguments are those of the twin in kernels/reference/affine.py. It knows no checkpoint format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmdeploy.kernels import invariant
from lmdeploy.kernels.triton.activation import gated_activation
from lmdeploy.kernels.triton.arrivals import NUM_COUNTERS, counters
from lmdeploy.kernels.triton.norm import rms_norm

MAX_FEW_ROWS = 64  # from here on dequantizing once costs less than dequantizing in every tile

_DEQUANTIZE_WARPS, _DEQUANTIZE_BLOCK = 8, 256  # eight channels for each thread: one 16-byte store, no exchange
_COPY_ELEMENTS = 1 << 26  # dequantized at once; more rows wait
_BLOCK_N = 64
_BLOCK_K = 128


@dataclass(frozen=True, eq=False)
class PackedAffine:
    """A weight [n, k]: w = q * scale + minimum per group of 16, 32, 64 or 128 adjacent input channels.

    q: uint8 [n, k], or with 4 bits [n, k / 2]: of each eight channels the first four in the low nibbles of four bytes,
    the others in the high ones. scales, mins: [n, G], float16 if that loses nothing, else float32.
    """

    q: Tensor
    scales: Tensor
    mins: Tensor
    bits: int

    @property
    def n(self) -> int:
        """Output features."""
        return self.q.shape[0]

    @property
    def k(self) -> int:
        """Input features."""
        return self.q.shape[1] * 8 // self.bits

    @property
    def group_size(self) -> int:
        """Input channels that share a scale."""
        return self.k // self.scales.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight."""
        return sum(t.numel() * t.element_size() for t in (self.q, self.scales, self.mins))

    @property
    def words(self) -> Tensor:
        """The integers as `dequantize` loads them: 4-bit ones eight at a time, int32 [n, k / 8]."""
        return self.q.view(torch.int32) if self.bits == 4 else self.q

    def rows(self, start: int, stop: int) -> PackedAffine:
        """A view of the rows from start up to stop."""
        return replace(self, q=self.q[start:stop], scales=self.scales[start:stop], mins=self.mins[start:stop])


def pack(q: Tensor, scales: Tensor, mins: Tensor, bits: int) -> PackedAffine:
    """q: uint8 [N, K], one value each, below 2 ** bits; scales, mins: [N, G]; K / G is 16, 32, 64 or 128."""
    if bits == 4:
        eights = q.unflatten(-1, (-1, 2, 4))
        q = (eights[..., 0, :] | eights[..., 1, :] << 4).flatten(-2)
    scales, mins = scales.float(), mins.float()
    if all(torch.equal(t.half().float(), t) for t in (scales, mins)):
        scales, mins = scales.half(), mins.half()
    return PackedAffine(q.contiguous(), scales.contiguous(), mins.contiguous(), bits)


def unpack(w: PackedAffine) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack`: q uint8 [N, K], scales and mins float32 [N, G]."""
    fours = w.q.unflatten(-1, (-1, 4))
    q = w.q if w.bits == 8 else torch.stack((fours & 15, fours >> 4), dim=-2).flatten(-3)
    return q, w.scales.float(), w.mins.float()


def dequantize(w: PackedAffine, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """The weight [N, K], or its given rows [T] as [T, K], computed in float32 and rounded to dtype once."""
    out = torch.empty(w.n if rows is None else len(rows), w.k, dtype=dtype, device=w.q.device)
    octets = out.numel() // 8
    if octets:
        _dequantize_kernel[(triton.cdiv(octets, _DEQUANTIZE_BLOCK),)](
            w.words,
            w.scales,
            w.mins,
            w.words if rows is None else rows,
            out,
            octets,
            w.k // 8,
            BITS=w.bits,
            GROUP=w.group_size,
            HAS_ROWS=rows is not None,
            BLOCK=_DEQUANTIZE_BLOCK,
            num_warps=_DEQUANTIZE_WARPS,
        )
    return out


def embed(ids: Tensor, w: PackedAffine, dtype: torch.dtype) -> Tensor:
    """Rows ids [T] of the weight: [T, K] in dtype."""
    return dequantize(w, dtype, ids)


@invariant.at_most(MAX_FEW_ROWS)
def linear(
    x: Tensor,
    w: PackedAffine,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """rms_norm(x) W^T + bias + residual: x [M, K], residual [M, N] -> [M, N] in out_dtype (x's).

    The norm runs where norm_weight [K] is given: x / rms(x) * (norm_offset + norm_weight). The sums of up to 64 rows do
    not depend on how many rows there are.
    """
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, norm_eps, norm_offset)
    x = x if x.stride(1) == 1 else x.contiguous()
    if len(x) <= MAX_FEW_ROWS:
        return _multiply_few(x, w, bias, residual, out_dtype or x.dtype)
    out = torch.empty(len(x), w.n, dtype=x.dtype, device=x.device)
    step = max(1, _COPY_ELEMENTS // w.k)
    for start in range(0, w.n, step):
        stop = min(start + step, w.n)
        weight = dequantize(w.rows(start, stop), x.dtype).t()
        if bias is None:
            torch.mm(x, weight, out=out[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, weight, out=out[:, start:stop])
    if residual is not None:
        out += residual
    return out if out_dtype is None else out.to(out_dtype)


def gated_mlp(
    x: Tensor,
    gate_up: PackedAffine,
    down: PackedAffine,
    activation: str,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """down(activation(gate) * up) + residual with gate | up = gate_up(rms_norm(x)): [M, C] -> [M, C].

    activation: silu, gelu or gelu_tanh. The first half of gate_up's rows is the gate.
    """
    both = linear(x, gate_up, norm_weight=norm_weight, norm_eps=norm_eps, norm_offset=norm_offset)
    return linear(gated_activation(both, activation), down, residual=residual)


def _multiply_few(
    x: Tensor, w: PackedAffine, bias: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """x W^T + bias + residual for up to 64 rows; several programs share the channels of one tile of outputs."""
    out = torch.empty(len(x), w.n, dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    tiles, blocks = triton.cdiv(w.n, _BLOCK_N), triton.cdiv(w.k, _BLOCK_K)
    wanted = 1 if tiles > NUM_COUNTERS else triton.cdiv(2 * _num_multiprocessors(x.device), tiles)
    blocks_each = triton.cdiv(blocks, max(1, min(wanted, blocks // 4)))
    splits = triton.cdiv(blocks, blocks_each)
    block_m = max(16, triton.next_power_of_2(len(x)))
    partial = torch.empty(tiles * splits if splits > 1 else 0, _BLOCK_N * block_m, dtype=torch.float32, device=x.device)
    residual = residual if residual is None or residual.stride(1) == 1 else residual.contiguous()
    _few_rows_kernel[(tiles, splits)](
        x,
        x.stride(0),
        w.q,
        w.scales,
        w.mins,
        out if bias is None else bias,
        out if residual is None else residual,
        0 if residual is None else residual.stride(0),
        out,
        partial,
        counters(x.device),
        len(x),
        w.n,
        w.k,
        blocks_each,
        splits,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BITS=w.bits,
        GROUP=w.group_size,
        IS_SPLIT=splits > 1,
        BLOCK_M=block_m,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        num_warps=4,
        num_stages=3,
    )
    return out


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def _dequantize_kernel(
    q_ptr,
    scale_ptr,
    min_ptr,
    rows_ptr,
    out_ptr,
    octets,
    row_octets,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Groups are whole in every row, so a channel's group follows from its place in the flat weight alone."""
    to = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = to < octets
    at = to
    if HAS_ROWS:
        at = tl.load(rows_ptr + to // row_octets, mask=inside, other=0).to(tl.int64) * row_octets + to % row_octets
    scale = tl.load(scale_ptr + at // (GROUP // 8), mask=inside, other=0.0).to(tl.float32)
    minimum = tl.load(min_ptr + at // (GROUP // 8), mask=inside, other=0.0).to(tl.float32)
    lane = tl.arange(0, 8)[None, :]
    if BITS == 4:
        integers = (tl.load(q_ptr + at, mask=inside, other=0)[:, None] >> (lane % 4 * 8 + lane // 4 * 4)) & 15
    else:
        integers = tl.load(q_ptr + at[:, None] * 8 + lane, mask=inside[:, None], other=0)
    values = integers.to(tl.float32) * scale[:, None] + minimum[:, None]
    tl.store(out_ptr + to[:, None] * 8 + lane, values.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def scaled_tile(integers, scale_ptr, min_ptr, rows, is_row, k, K, GROUP: tl.constexpr, SPAN: tl.constexpr):
    """integers * scale + minimum in float32: [ROWS, COLUMNS] that stand for SPAN channels from k of rows [ROWS] int64."""
    EACH: tl.constexpr = min(GROUP, SPAN)
    GROUPS: tl.constexpr = SPAN // EACH
    wide = integers.to(tl.float32)
    if GROUPS == 1:
        at = rows * (K // GROUP) + k // GROUP
        scale = tl.load(scale_ptr + at, mask=is_row, other=0.0).to(tl.float32)
        minimum = tl.load(min_ptr + at, mask=is_row, other=0.0).to(tl.float32)
        tile = wide * scale[:, None] + minimum[:, None]
    else:
        groups = k // GROUP + tl.arange(0, GROUPS)
        inside = is_row[:, None] & (groups < K // GROUP)[None, :]
        at = rows[:, None] * (K // GROUP) + groups[None, :]
        scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
        minimum = tl.load(min_ptr + at, mask=inside, other=0.0).to(tl.float32)
        by_group = tl.reshape(wide, (wide.shape[0], GROUPS, wide.shape[1] // GROUPS))
        tile = tl.reshape(by_group * scale[:, :, None] + minimum[:, :, None], (wide.shape[0], wide.shape[1]))
    return tile


@triton.jit
def channels_of(k, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Channels from k that columns of a tile stand for: all, or with 4 bits those in the low nibbles of adjacent bytes.

    Those in the high nibbles follow four later.
    """
    if BITS == 4:
        byte = tl.arange(0, BLOCK_K // 2)
        channels = k + byte // 4 * 8 + byte % 4
    else:
        channels = k + tl.arange(0, BLOCK_K)
    return channels


@triton.jit
def add_product(
    total,
    x,
    x_high,
    w_ptr,
    scale_ptr,
    min_ptr,
    rows,
    is_row,
    k,
    K,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """total [ROWS, M] plus BLOCK_K channels from k of weight rows [ROWS] int64 times x [channels_of, M].

    x_high: x four channels further, for the high nibbles. BITS: 4 or 8 of affine weights, 16 for plain ones.
    """
    if BITS == 4:
        byte = k // 2 + tl.arange(0, BLOCK_K // 2)
        inside = is_row[:, None] & (byte < K // 2)[None, :]
        q = tl.load(w_ptr + rows[:, None] * (K // 2) + byte[None, :], mask=inside, other=0)
        w = scaled_tile(q & 15, scale_ptr, min_ptr, rows, is_row, k, K, GROUP, BLOCK_K)
        total = tl.dot(w.to(x.dtype), x, total, input_precision="ieee")
        w = scaled_tile(q >> 4, scale_ptr, min_ptr, rows, is_row, k, K, GROUP, BLOCK_K)
        total = tl.dot(w.to(x.dtype), x_high, total, input_precision="ieee")
    else:
        channel = k + tl.arange(0, BLOCK_K)
        inside = is_row[:, None] & (channel < K)[None, :]
        w = tl.load(w_ptr + rows[:, None] * K + channel[None, :], mask=inside, other=0)
        if BITS == 8:
            w = scaled_tile(w, scale_ptr, min_ptr, rows, is_row, k, K, GROUP, BLOCK_K)
        total = tl.dot(w.to(x.dtype), x, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["M", "blocks_each", "splits"])
def _few_rows_kernel(
    x_ptr,
    x_stride,
    q_ptr,
    scale_ptr,
    min_ptr,
    bias_ptr,
    residual_ptr,
    residual_stride,
    out_ptr,
    partial_ptr,
    counter_ptr,
    M,
    N,
    K,
    blocks_each,
    splits,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Outputs are computed transposed, [BLOCK_N, BLOCK_M]; a tile's last program adds the sums in fixed order."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    is_n = n < N
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    last = tl.minimum((split + 1) * blocks_each, tl.cdiv(K, BLOCK_K))
    for block in range(split * blocks_each, last):
        k = block * BLOCK_K
        channel = channels_of(k, BITS, BLOCK_K)
        inside = (m < M)[None, :] & (channel < K)[:, None]
        x_at = x_ptr + m[None, :] * x_stride + channel[:, None]
        x = tl.load(x_at, mask=inside, other=0.0)
        x_high = x
        if BITS == 4:
            x_high = tl.load(x_at + 4, mask=inside, other=0.0)
        total = add_product(total, x, x_high, q_ptr, scale_ptr, min_ptr, n, is_n, k, K, BITS, GROUP, BLOCK_K)
    is_last = True
    if IS_SPLIT:
        place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        tile_ptr = partial_ptr + tile.to(tl.int64) * (splits * BLOCK_N * BLOCK_M) + place
        tl.store(tile_ptr + split * (BLOCK_N * BLOCK_M), total)
        tl.debug_barrier()
        is_last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel") == splits - 1
    if is_last:
        if IS_SPLIT:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for other in range(splits):
                total += tl.load(tile_ptr + other * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            tl.store(counter_ptr + tile, 0)
        inside = is_n[:, None] & (m < M)[None, :]
        if HAS_BIAS:
            total += tl.load(bias_ptr + n, mask=is_n, other=0.0).to(tl.float32)[:, None]
        if HAS_RESIDUAL:
            at = m[None, :] * residual_stride + n[:, None]
            total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        out = m[None, :].to(tl.int64) * N + n[:, None]
        tl.store(out_ptr + out, total.to(out_ptr.dtype.element_ty), mask=inside)
