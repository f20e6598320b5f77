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
    "awq": "affine:AffineMethod",
    "compressed-tensors": "affine:AffineMethod",
    "fbgemm_fp8": "fp8:Float8Method",
    "fp8": "fp8:Float8Method",
    "gguf": "affine:AffineMethod",
    "gptq": "affine:AffineMethod",
    "mxfp4": "unquantized:UnquantizedMethod",
    "smooth_quant": "w8a8:Int8Method",
}
"""Format of a checkpoint (its config's `quant_method`) -> module and LinearMethod that runs its quantized linears.

compressed-tensors may also hold float8 or int8 weights, and smooth_quant float8 ones: what a linear's tensors are decides.
"""


def choose_method(kinds: Collection[str], device: torch.device, dtype: torch.dtype) -> LinearMethod:
    """A new method for one linear, by the kinds of its parts: dense, affine4, affine8, float8_e4m3fn, float8_e5m2, int8.

    In float32 everything is dense, so that results are exact; so is a linear that mixes dense and quantized parts. On a CPU
    also what no kernel there is fast at: 8-bit floats and, without compiled kernels, 8 bits by groups.
    """
    import torch

    from lmdeploy.kernels import cpu

    only = next(iter(kinds)) if len(set(kinds)) == 1 else "mixed"
    on_cpu = device.type == "cpu"
    if dtype == torch.float32 or (on_cpu and "affine8" in kinds and not cpu.is_available()):
        return _method("none")
    if kinds and all(kind.startswith("affine") for kind in kinds):
        return _method("gguf")
    if only.startswith("float8") and not on_cpu:
        return _method("fp8")
    return _method("smooth_quant" if only == "int8" else "none")


def _method(name: str) -> LinearMethod:
    module, class_name = QUANTIZATION[name].split(":")
    return getattr(import_module(f"lmdeploy.quantization.{module}"), class_name)()
