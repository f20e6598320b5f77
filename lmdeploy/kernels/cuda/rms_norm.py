"""RMS norm of 16-bit rows in CUDA C++: choice of a variant and launch. See rms_norm.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lmdeploy.kernels.cuda import nvrtc
from lmdeploy.kernels.cuda.driver import Kernel
from lmdeploy.kernels.cuda.skinny_gemm import arch, is_available

_VECTOR = 8  # elements of 16 bytes
_MAX_COLUMNS = 16384
_MAX_THREADS = 512


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether x is rows [T, C] of the weight's 16-bit type that can be read 16 bytes at a time."""
    if x.dim() != 2 or x.dtype not in (torch.float16, torch.bfloat16) or weight.dtype != x.dtype:
        return False
    is_whole = x.shape[1] % _VECTOR == 0 and x.stride(0) % _VECTOR == 0 and x.stride(1) == 1 and x.data_ptr() % 16 == 0
    return is_whole and weight.data_ptr() % 16 == 0 and x.shape[1] <= _MAX_COLUMNS and is_available()


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """x / rms(x) * (offset + weight): [T, C] -> [T, C], weight [C]."""
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    vectors = columns // _VECTOR
    each = -(-vectors // _MAX_THREADS)
    threads = -(-vectors // (each * 32)) * 32
    if rows:
        kernel = _kernel(x.dtype == torch.float16, each, threads)
        kernel(rows, (x, weight, out, columns, x.stride(0), float(eps), float(offset)))
    return out


@functools.cache
def _kernel(is_half: bool, vectors: int, threads: int) -> Kernel:
    binary = nvrtc.cubin("rms_norm.cu", {"FP16": int(is_half), "VECTORS": vectors}, arch())
    return Kernel(binary, "rms_norm", threads=threads, overlaps=torch.cuda.get_device_capability() >= (9, 0))
