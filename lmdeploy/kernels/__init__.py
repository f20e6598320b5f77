"""The operations, each one function; what runs is picked by the tensors' device. No config, no module below this line."""

from __future__ import annotations

from lmdeploy.kernels.reference.attention import (
    apply_rope,
    latent_store_attend,
    paged_attention,
    rope_store_attend,
    store_kv,
    store_rotate_attend,
)
from lmdeploy.kernels.reference.basic import activate, gated_activation, rms_norm
from lmdeploy.kernels.reference.moe import routed_mlp

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
