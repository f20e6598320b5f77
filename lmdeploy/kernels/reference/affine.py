"""Linear layers over affine 4 and 8-bit weights in plain PyTorch, on any device: the weight is dequantized for each product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmdeploy.kernels import invariant
from lmdeploy.kernels.reference.basic import gated_activation, rms_norm


@dataclass(frozen=True, eq=False)
class PackedAffine:
    """A weight [n, k]: w = q * scale + minimum per group of adjacent input channels.

    q: uint8 [n, k], or with 4 bits [n, k / 2], even channels in the low nibbles. scales, mins: float32 [n, G].
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
    def num_bytes(self) -> int:
        """Bytes of the packed weight."""
        return sum(t.numel() * t.element_size() for t in (self.q, self.scales, self.mins))


def pack(q: Tensor, scales: Tensor, mins: Tensor, bits: int) -> PackedAffine:
    """q: uint8 [N, K], one value each, below 2 ** bits; scales, mins: [N, G]."""
    if bits == 4:
        q = q[:, 0::2] | q[:, 1::2] << 4
    return PackedAffine(q.contiguous(), scales.float().contiguous(), mins.float().contiguous(), bits)


def unpack(w: PackedAffine) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `pack`: q uint8 [N, K], scales and mins float32 [N, G]."""
    return _integers(w.q, w.bits), w.scales, w.mins


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

    The norm runs where norm_weight [K] is given: x / rms(x) * (norm_offset + norm_weight).
    """
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, norm_eps, norm_offset)
    out = invariant.linear(x, _dense(w.q, w.scales, w.mins, w.bits, x.dtype), bias)
    if residual is not None:
        out = out + residual
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


def embed(ids: Tensor, w: PackedAffine, dtype: torch.dtype) -> Tensor:
    """Rows ids [T] of the weight: [T, K] in dtype."""
    return _dense(w.q[ids], w.scales[ids], w.mins[ids], w.bits, dtype)


def _integers(q: Tensor, bits: int) -> Tensor:
    return q if bits == 8 else torch.stack((q & 15, q >> 4), dim=-1).flatten(-2)


def _dense(q: Tensor, scales: Tensor, mins: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """[N, K] in dtype, computed in float32."""
    wide = _integers(q, bits).float().unflatten(-1, (scales.shape[-1], -1))
    return (wide * scales[..., None] + mins[..., None]).flatten(-2).to(dtype)
