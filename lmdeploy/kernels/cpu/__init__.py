"""CPU kernels in C++, compiled at first use: quantized and bfloat16 linear layers, attention, norms.

They take and return CPU tensors and know no module. Where `is_available()` is False the plain twins run instead.
"""

from __future__ import annotations

from torch import Tensor

from lmdeploy.kernels.cpu.attention import rope_store_attend, supports
from lmdeploy.kernels.cpu.build import is_available, library
from lmdeploy.kernels.cpu.linear import (
    can_multiply_dense,
    dense_linear,
    embed,
    gated_activation,
    gated_mlp,
    linear,
    rms_norm,
)
from lmdeploy.kernels.cpu.memory import prefer_huge_pages
from lmdeploy.kernels.cpu.packed import DTYPES, PackedAffine, pack, unpack
from lmdeploy.kernels.cpu.tape import Tapes

__all__ = [
    "PackedAffine",
    "Tapes",
    "can_multiply_dense",
    "can_run",
    "dense_linear",
    "embed",
    "gated_activation",
    "gated_mlp",
    "instruction_set",
    "is_available",
    "linear",
    "pack",
    "prefer_huge_pages",
    "rms_norm",
    "rope_store_attend",
    "supports",
    "unpack",
]


def can_run(x: Tensor) -> bool:
    """Whether these kernels are there and take activations like x."""
    return x.device.type == "cpu" and x.dtype in DTYPES and is_available()


def instruction_set() -> str:
    """What the kernels were compiled for: avx512-vnni-bf16, avx512-vnni, avx2-vnni, avx2 or portable."""
    return library().lm_instruction_set().decode()
