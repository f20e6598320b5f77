"""Descriptions of matrices in device memory for Hopper's tensor copies. They are parameters of a kernel, by value."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

from lmdeploy.kernels.cuda.driver import check, driver

_TYPES = {torch.float16: 6, torch.bfloat16: 9}  # CUtensorMapDataType
_SWIZZLE_128B = 3  # CUtensorMapSwizzle
_L2_256B = 3  # CUtensorMapL2promotion
_BYTES, _ALIGNMENT = 128, 64
_ROW_BYTES = 128  # of a box: one period of the swizzle


class TensorMap:
    """CUtensorMap of a tensor of 16-bit numbers and up to five dimensions; what lies outside of it is read as zero.

    sizes, box: elements along each dimension, the contiguous one first; strides: bytes between neighbours of every
    dimension but the first, multiples of 16. A row of the box is 128 bytes, swizzled in shared memory. Raises KernelError.
    """

    def __init__(
        self,
        address: int,
        dtype: torch.dtype,
        sizes: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
    ) -> None:
        rank = len(sizes)
        self._memory = ctypes.create_string_buffer(_BYTES + _ALIGNMENT)
        start = ctypes.addressof(self._memory)
        self.value = (ctypes.c_char * _BYTES).from_address(start + -start % _ALIGNMENT)
        status = driver().cuTensorMapEncodeTiled(
            ctypes.byref(self.value),
            ctypes.c_int(_TYPES[dtype]),
            ctypes.c_uint32(rank),
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*sizes),
            (ctypes.c_uint64 * max(rank - 1, 1))(*strides),
            (ctypes.c_uint32 * rank)(*box),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            ctypes.c_int(0),
            ctypes.c_int(_SWIZZLE_128B),
            ctypes.c_int(_L2_256B),
            ctypes.c_int(0),
        )
        check(status, f"a tensor map of {tuple(sizes)} in boxes of {tuple(box)}")


@functools.lru_cache(maxsize=16384)
def rows_map(address: int, dtype: torch.dtype, columns: int, rows: int, row_bytes: int, box_rows: int) -> TensorMap:
    """Of a matrix. It depends on these numbers alone: it stays right for whatever comes to lie there."""
    return TensorMap(address, dtype, (columns, rows), (row_bytes,), (_ROW_BYTES // dtype.itemsize, box_rows))
