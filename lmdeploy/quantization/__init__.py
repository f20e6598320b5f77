"""The ways in which a linear layer's weight can be stored. It owns the table and the choice, no arithmetic."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lmdeploy.quantization.method import LinearMethod

QUANTIZATION: dict[str, str] = {
    "none": "unquantized:UnquantizedMethod",
    "gguf": "affine:AffineMethod",
    "mxfp4": "unquantized:UnquantizedMethod",
}
"""Format of a checkpoint (its config's `quant_method`) -> module and LinearMethod that runs its quantized linears."""


def choose_method(kinds: Collection[str], device: torch.device, dtype: torch.dtype) -> LinearMethod:
    """A new method for one linear, by the kinds of its parts (dense, affine4, affine8).

    In float32 everything is dense, so that results are exact; so is a linear that mixes dense and quantized parts, and on a CPU
    without compiled kernels one of 8 bits, for which torch has no product by groups.
    """
    import torch

    from lmdeploy.kernels import cpu

    is_affine = bool(kinds) and all(kind.startswith("affine") for kind in kinds)
    has_kernel = device.type != "cpu" or "affine8" not in kinds or cpu.is_available()
    return _method("gguf" if is_affine and dtype != torch.float32 and has_kernel else "none")


def _method(name: str) -> LinearMethod:
    module, class_name = QUANTIZATION[name].split(":")
    return getattr(import_module(f"lmdeploy.quantization.{module}"), class_name)()
