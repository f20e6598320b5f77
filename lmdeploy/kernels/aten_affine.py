"""Linear layers over affine 4-bit weights with torch's own CPU product, for machines on which no C++ kernel can be compiled.

Same names as reference/affine.py, which computes what torch's product is slow at: many tokens at once, and embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.kernels import invariant
from lmdeploy.kernels.reference import affine
from lmdeploy.kernels.reference.basic import gated_activation, rms_norm

_MAX_TOKENS = 8  # beyond, dequantizing once and multiplying in bfloat16 is faster
_INNER_TILES = 1  # torch wants the number, its CPU layout ignores it


@dataclass(frozen=True, eq=False)
class PackedInt4:
    """codes: the weight for the twin. product: the same in torch's layout, with [G, N, 2] bfloat16 scales and zeros."""

    codes: affine.PackedAffine
    product: Tensor
    scales_and_zeros: Tensor

    @property
    def bits(self) -> int:
        return self.codes.bits

    @property
    def num_bytes(self) -> int:
        """Bytes of both forms."""
        others = (self.product, self.scales_and_zeros)
        return self.codes.num_bytes + sum(t.numel() * t.element_size() for t in others)


def supports(n: int, group_size: int, bits: int) -> bool:
    """Whether torch's product takes a weight of n rows."""
    return bits == 4 and group_size in (32, 64, 128) and n % 16 == 0


def pack(q: Tensor, scales: Tensor, mins: Tensor, bits: int) -> PackedInt4:
    """q: uint8 [N, K], one value each, below 16; scales, mins: [N, G] of which torch's product gets bfloat16 roundings."""
    product = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), _INNER_TILES)
    zeros = mins + 8 * scales  # torch's form: (q - 8) * scale + zero
    return PackedInt4(affine.pack(q, scales, mins, bits), product, torch.stack((scales.T, zeros.T), dim=-1).bfloat16())


def unpack(w: PackedInt4) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack`: q uint8 [N, K], scales and mins float32 [N, G]."""
    return affine.unpack(w.codes)


@invariant.at_most(_MAX_TOKENS)
def linear(
    x: Tensor,
    w: PackedInt4,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """rms_norm(x) W^T + bias + residual: x bfloat16 [M, K] -> [M, N], arguments as in the twin."""
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, norm_eps, norm_offset)
    if len(x) > _MAX_TOKENS:
        return affine.linear(x, w.codes, bias=bias, residual=residual, out_dtype=out_dtype)
    group_size = w.codes.k // w.scales_and_zeros.shape[0]
    out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), w.product, group_size, w.scales_and_zeros)
    for addend in (bias, residual):
        out = out if addend is None else out + addend
    return out if out_dtype is None else out.to(out_dtype)


def gated_mlp(
    x: Tensor,
    gate_up: PackedInt4,
    down: PackedInt4,
    activation: str,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """down(activation(gate) * up) + residual with gate | up = gate_up(rms_norm(x)): [M, C] -> [M, C]."""
    both = linear(x, gate_up, norm_weight=norm_weight, norm_eps=norm_eps, norm_offset=norm_offset)
    return linear(gated_activation(both, activation), down, residual=residual)


def embed(ids: Tensor, w: PackedInt4, dtype: torch.dtype) -> Tensor:
    """Rows ids [T] of the weight: [T, K] in dtype."""
    return affine.embed(ids, w.codes, dtype)
