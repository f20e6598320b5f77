"""The operations, each one function; what runs is picked by the tensors' device. No config and no module below this line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lmdeploy.kernels import cpu
from lmdeploy.kernels.reference import attention, basic
from lmdeploy.kernels.reference.attention import (
    apply_rope,
    latent_store_attend,
    paged_attention,
    store_kv,
    store_rotate_attend,
)
from lmdeploy.kernels.reference.basic import activate
from lmdeploy.kernels.reference.moe import routed_mlp
from lmdeploy.kernels.spec import AttentionSpec

if TYPE_CHECKING:
    from lmdeploy.kernels.reference.attention import Blocks
    from lmdeploy.layers.context import ForwardContext

__all__ = [
    "activate",
    "apply_rope",
    "gated_activation",
    "latent_store_attend",
    "paged_attention",
    "rms_norm",
    "rope_store_attend",
    "routed_mlp",
    "store_kv",
    "store_rotate_attend",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / rms(x) * (offset + weight) over the last dimension."""
    if cpu.can_run(x):
        return cpu.rms_norm(x, weight, eps, offset)
    return basic.rms_norm(x, weight, eps, offset)


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up: [T, 2 I] -> [T, I], gate in the first half."""
    if cpu.can_run(gate_up):
        return cpu.gated_activation(gate_up, activation)
    return basic.gated_activation(gate_up, activation)


def rope_store_attend(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Blocks,
    values: Blocks,
    ctx: ForwardContext,
    spec: AttentionSpec,
) -> Tensor:
    """Per-head norms, rotation, cache write and attention of one layer: [T, (H + 2 Hkv) * D] -> [T, H * D].

    cos, sin: [T, R/2] float32. keys, values: [NB, Hkv, S, D], plain or quantized. Arguments and result as in the reference.
    """
    if isinstance(keys, Tensor) and isinstance(values, Tensor) and cpu.can_run(qkv) and cpu.supports(spec, qkv.dtype):
        return cpu.rope_store_attend(qkv, cos, sin, keys, values, ctx, spec)
    return attention.rope_store_attend(qkv, cos, sin, keys, values, ctx, spec)
