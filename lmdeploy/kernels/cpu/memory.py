"""Memory on huge pages for what every step reads from end to end: weights and caches. It knows no layout.

With pages of 4 KiB a step of a small model looks up 25,000 addresses, on a virtual machine through two levels of tables.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_SLAB = 8 << 20
_ALIGNMENT = 64
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only

_slab = torch.empty(0, dtype=torch.uint8)  # what is left of the last one; its weights keep the memory alive


def allocate(num_bytes: int) -> Tensor:
    """Uninitialized bytes at a multiple of 64, [num_bytes] uint8; small pieces share a mapping and are freed with it."""
    global _slab
    needed = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
    if needed > _SLAB // 2:
        return _map(needed)[:num_bytes]
    if needed > len(_slab):
        _slab = _map(_SLAB)
    piece, _slab = _slab[:num_bytes], _slab[needed:]
    return piece


def prefer_huge_pages(tensor: Tensor) -> None:
    """Ask for huge pages under a large CPU tensor that has not been written yet. Without effect where there are none."""
    start, size = tensor.data_ptr(), tensor.untyped_storage().nbytes()
    first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if _ADVICE is None or end - first < _HUGE_PAGE:
        return
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_int(_ADVICE))


@torch.inference_mode(False)  # a slab outlives the mode in which its first piece is asked for
def _map(num_bytes: int) -> Tensor:
    if _ADVICE is None:
        return torch.empty(num_bytes, dtype=torch.uint8)
    size = -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(_ADVICE)
    return torch.frombuffer(memory, dtype=torch.uint8)
