"""Linear layers over 4-bit weights on the GPU: few tokens multiply the packed weight, many a 16-bit copy of it.

The copy is made for each product, or kept where memory allows it. Functions as in kernels/reference/affine.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmdeploy.kernels import invariant
from lmdeploy.kernels.cuda import byte_gemm, dense, packed_stream_gemm, skinny_gemm, wide_gemm
from lmdeploy.kernels.cuda import layer_tail as tail
from lmdeploy.kernels.cuda.skinny_gemm import MAX_TOKENS, Weight

_GROUP_SIZES = (32, 64, 128)
_ROWS_AT_ONCE = 16384  # of a copy that is made for a product; half as many took twice as long
_EMBEDDED_AT_ONCE = 256  # each row unpacks the 16 of its tile


@dataclass(eq=False)
class PackedAffine:
    """A packed weight [n, k]. copy: the same in 16 bits [n, k], if it is kept."""

    weight: Weight
    copy: Tensor | None = None

    @property
    def n(self) -> int:
        """Output features."""
        return self.weight.n

    @property
    def k(self) -> int:
        """Input features."""
        return self.weight.k

    @property
    def bits(self) -> int:
        """Bits of an integer."""
        return self.weight.bits

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weight, without the copy."""
        return self.weight.data.nbytes

    @property
    def piece_bytes(self) -> int:
        """What is made of the copy at a time, where it is not kept."""
        return 2 * self.k * min(self.n, _ROWS_AT_ONCE)

    def keep_copy(self, dtype: torch.dtype) -> None:
        """Make the copy and keep it."""
        self.copy = skinny_gemm.dequantize(self.weight, dtype)


def supports(n: int, k: int, group_size: int, bits: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these functions take such a weight."""
    return bits == 4 and group_size in _GROUP_SIZES and skinny_gemm.supports(n, k, dtype, device)


def pack(q: Tensor, scales: Tensor, mins: Tensor, bits: int) -> PackedAffine:
    """q: uint8 [N, K], one value each, below 16; scales, mins: [N, G] float32."""
    return PackedAffine(skinny_gemm.pack(q, scales, mins, _integer_zeros(scales, mins)))


def unpack(w: PackedAffine) -> tuple[Tensor, Tensor, Tensor]:
    """q uint8 [N, K], scales and mins float32 [N, G], rounded to float16 as they are stored."""
    return skinny_gemm.unpack(w.weight)


@invariant.at_most(MAX_TOKENS)
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
    """rms_norm(x) W^T + bias + residual, [M, K] -> [M, N]; the result may take the residual's place."""
    rest: dict[str, Any] = {"bias": bias, "residual": residual, "out_dtype": out_dtype, "out": residual}
    if _is_for_bytes(x, w):
        norm: dict[str, Any] = {"norm_weight": norm_weight, "norm_eps": norm_eps, "norm_offset": norm_offset}
        return byte_gemm.byte_gemm(x, w.weight, **rest, **norm)
    if _is_wide(x, w):
        x = dense.normalize(x, norm_weight, norm_eps, norm_offset)
        return wide_gemm.wide_gemm(x, w.weight, **rest)
    if _is_skinny(x):
        x, fused = dense.front_norm(x, norm_weight, norm_eps, norm_offset)
        return _few_tokens(x, w, is_gated=False, has_norm=bool(fused))(x, w.weight, **rest, **fused)
    x = dense.normalize(x, norm_weight, norm_eps, norm_offset)
    copy = _kept_copy(x, w)
    if copy is not None:
        return dense.product(x, copy, bias=bias, residual=residual, out_dtype=out_dtype)
    if w.n > _ROWS_AT_ONCE and (w.copy is None or invariant.applies(len(x))):
        return _matmul_in_pieces(x, w.weight, bias, residual, out_dtype)
    return dense.matmul(x, _copy(w, x.dtype), bias, residual, out_dtype)


@invariant.at_most(MAX_TOKENS)
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
    """down(activation(gate) * up) + residual with gate | up = gate_up(rms_norm(x)): [M, C] -> [M, C]."""
    norm: dict[str, Any] = {"norm_weight": norm_weight, "norm_eps": norm_eps, "norm_offset": norm_offset}
    if _is_for_bytes(x, gate_up) and gate_up.n % 32 == 0:
        hidden = byte_gemm.byte_gemm(x, gate_up.weight, activation=activation, **norm)
    elif _is_wide(x, gate_up) and gate_up.n % 32 == 0:
        x = dense.normalize(x, norm_weight, norm_eps, norm_offset)
        hidden = wide_gemm.wide_gemm(x, gate_up.weight, activation=activation)
    elif _is_skinny(x) and gate_up.n % 32 == 0:
        x, fused = dense.front_norm(x, norm_weight, norm_eps, norm_offset)
        product = _few_tokens(x, gate_up, is_gated=True, has_norm=bool(fused))
        hidden = product(x, gate_up.weight, activation=activation, **fused)
    elif (copy := _kept_copy(x, gate_up)) is not None:
        x = dense.normalize(x, norm_weight, norm_eps, norm_offset)
        hidden = dense.product(x, copy, activation=activation)
    else:
        from lmdeploy.kernels import gated_activation

        hidden = gated_activation(linear(x, gate_up, **norm), activation)
    return linear(hidden, down, residual=residual)


def layer_tail(
    x: Tensor,
    residual: Tensor,
    weights: Sequence[PackedAffine],
    activation: str,
    norm: dict[str, Any],
    next_norm_weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor | None] | None:
    """As kernels/cuda/layer_tail.py; weights: o, gate_up, down and, if there is a layer behind, its qkv. None: not here."""
    o, gate_up, down, *last = (w.weight for w in weights)
    behind = tail.Behind(next_norm_weight, last[0], bias) if last and next_norm_weight is not None else None
    fits = residual.shape == (1, o.n) and residual.dtype == x.dtype and residual.is_contiguous()
    if not fits or not tail.is_faster(x, o, gate_up, down, behind):
        return None
    return tail.layer_tail(x, residual, o, gate_up, down, activation, behind=behind, **norm)


def embed(ids: Tensor, w: PackedAffine, dtype: torch.dtype) -> Tensor:
    """Rows ids [T] of the weight: [T, K] in dtype."""
    if w.copy is not None:
        return w.copy[ids]
    if len(ids) > _EMBEDDED_AT_ONCE:
        return torch.cat([embed(part, w, dtype) for part in ids.split(_EMBEDDED_AT_ONCE)])
    weight = w.weight
    tiles = weight.data[:, ids // 16].contiguous()
    q, scales, mins = skinny_gemm.unpack(Weight(tiles, len(ids) * 16, weight.k, 4, weight.group_size, weight.has_zeros))
    rows = torch.arange(len(ids), device=ids.device) * 16 + ids % 16
    wide = q[rows].float().unflatten(-1, (-1, weight.group_size))
    return (wide * scales[rows, :, None] + mins[rows, :, None]).flatten(-2).to(dtype)


def _is_for_bytes(x: Tensor, w: PackedAffine) -> bool:
    """Whether Hopper's product of integers can, and should: it is the fastest, or bits must not depend on other tokens."""
    is_wanted = invariant.applies(len(x)) or len(x) in byte_gemm.FASTEST_TOKENS
    return is_wanted and wide_gemm.supports(x, w.weight)


def _is_wide(x: Tensor, w: PackedAffine) -> bool:
    """Whether Hopper's own kernel can, and is the fastest."""
    return len(x) >= wide_gemm.FIRST_TOKENS and not invariant.applies(len(x)) and wide_gemm.supports(x, w.weight)


def _is_skinny(x: Tensor) -> bool:
    """Whether x has few enough tokens for mma.sync, whose order of summation differs from 8 tokens to 32."""
    return len(x) <= MAX_TOKENS and not invariant.applies(len(x))


def _few_tokens(x: Tensor, w: PackedAffine, *, is_gated: bool, has_norm: bool) -> Callable[..., Tensor]:
    """The kernel that streams whole columns of tiles, where it was measured to be faster, or the one for more tokens."""
    if packed_stream_gemm.is_faster(x, w.weight, is_gated=is_gated, has_norm=has_norm):
        return packed_stream_gemm.packed_stream_gemm
    return skinny_gemm.skinny_gemm


def _kept_copy(x: Tensor, w: PackedAffine) -> Tensor | None:
    """The kept copy, for more tokens than the packed weight takes; none where results must not depend on its being kept."""
    return None if _is_skinny(x) or invariant.applies(len(x)) else w.copy


def _matmul_in_pieces(
    x: Tensor, w: Weight, bias: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    """x W^T + bias + residual, by a copy of some rows of W at a time; the result takes the residual's place."""
    out = x.new_empty(len(x), w.n, dtype=out_dtype) if residual is None else residual
    is_one_call = bias is None and out.dtype == x.dtype and not invariant.applies(len(x))
    for start in range(0, w.n, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, w.n)
        rows, part = skinny_gemm.dequantize(w, x.dtype, start, stop), out[:, start:stop]
        if is_one_call:
            part.addmm_(x, rows.T, beta=0 if residual is None else 1)
        else:
            addends = None if bias is None else bias[start:stop], None if residual is None else part
            part.copy_(dense.matmul(x, rows, *addends, out_dtype))
        del rows  # or there would be two of them
    return out


def _copy(w: PackedAffine, dtype: torch.dtype) -> Tensor:
    return skinny_gemm.dequantize(w.weight, dtype) if w.copy is None else w.copy


def _integer_zeros(scales: Tensor, mins: Tensor) -> Tensor | None:
    """The zeros [N, G] uint8 of which the minima are multiples, if they are integers of 4 bits."""
    zeros = torch.where(scales == 0, 0.0, torch.round(-mins / scales))
    fits = (zeros >= 0) & (zeros <= 15) & ((zeros * scales + mins).abs() <= 1e-5 * mins.abs())
    return zeros.to(torch.uint8) if bool(fits.all()) else None
