# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Writes the compressed entries of multi-head latent attention. It rotates and attends to nothing."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def store_entries(latent: Tensor, rope_key: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """latent [T, L] | rope_key [T, R] into cache [NB, 1, S, L + R] at slot = block * S + offset; a slot below 0 is skipped."""
    size, rotated = latent.shape[1], rope_key.shape[1]
    _store_entries[(len(latent),)](
        latent,
        rope_key,
        cache,
        slot_mapping,
        latent.stride(0),
        rope_key.stride(0),
        cache.stride(0),
        cache.stride(2),
        BLOCK_SIZE=cache.shape[2],
        SIZE=size,
        ROTATED=rotated,
        PADDED=triton.next_power_of_2(max(size, rotated)),
    )


@triton.jit
def _store_entries(
    latent_ptr, rope_ptr, cache_ptr, slots_ptr, latent_stride, rope_stride, block_stride, token_stride,
    BLOCK_SIZE: tl.constexpr, SIZE: tl.constexpr, ROTATED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        entry = cache_ptr + slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * token_stride
        d = tl.arange(0, PADDED)
        latent = tl.load(latent_ptr + token * latent_stride + d, mask=d < SIZE)
        tl.store(entry + d, latent.to(cache_ptr.dtype.element_ty), mask=d < SIZE)
        key = tl.load(rope_ptr + token * rope_stride + d, mask=d < ROTATED)
        tl.store(entry + SIZE + d, key.to(cache_ptr.dtype.element_ty), mask=d < ROTATED)
