"""What one attention layer computes, as numbers and small tensors. It knows no module and no config."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """softmax(softcap(scale * q k^T) + alibi, sinks) v over the keys that a causal window lets through.

    window: a query at position i sees keys i - window + 1 .. i. alibi_slopes, sinks: [H] float32; the bias is
    slope * key position, or with alibi_unscaled the same rounded to bfloat16 and scaled with q k^T. q_norm, k_norm: [D]
    weights of a per-head RMS norm before the rotation. clip: bound of q, k and v before anything else. logn_length: the
    rotated query of 1-based position i grows by log_length(i) beyond that length.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    interleaved: bool = False
    alibi_slopes: Tensor | None = None
    alibi_unscaled: bool = False
    sinks: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    qk_norm_eps: float = 0.0
    qk_norm_offset: float = 0.0
    clip: float | None = None
    logn_length: int | None = None
