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

    In float32 everything is dense, so that results are exact; so is a linear that mixes dense and quantized parts.
    """
    import torch

    is_affine = bool(kinds) and all(kind.startswith("affine") for kind in kinds)
    if is_affine and dtype != torch.float32:
        return _method(QUANTIZATION["gguf"])
    return _method(QUANTIZATION["none"])


def _method(entry: str) -> LinearMethod:
    module, name = entry.split(":")
    return getattr(import_module(f"lmdeploy.quantization.{module}"), name)()  # type: ignore[no-any-return]
