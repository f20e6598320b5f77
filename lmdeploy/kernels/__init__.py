"""The operations, each one function; what runs is picked by the tensors' device. No config, no module below this line."""

from __future__ import annotations

from lmdeploy.kernels.reference.attention import apply_rope, paged_attention, rope_store_attend, store_kv
from lmdeploy.kernels.reference.basic import activate, gated_activation, rms_norm

__all__ = [
    "activate",
    "apply_rope",
    "gated_activation",
    "paged_attention",
    "rms_norm",
    "rope_store_attend",
    "store_kv",
]
