"""Which format quantized weights are in, whatever config and user say, and which formats nothing reads. It reads no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy.errors import ModelNotSupported
from lmdeploy.logging import get_logger
from lmdeploy.models.weight_files import TensorSource
from lmdeploy.quantization import QUANTIZATION

_UNSUPPORTED = {
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".q_weight": "EXL2",
    ".trellis": "EXL3",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    ".Qidxs": "QuIP#",
    ".B": "Marlin",
    ".scale_packed": "Marlin 2:4",
    ".bitmask": "sparse compressed-tensors",
    ".weight_global_scale": "NVFP4",
    ".weight_scale_2": "NVFP4",
}
# What a format that was found may be called, in config.json or by the user.
_OTHER_NAMES = {
    "none": ("hf", "llama", "qwen", "meta_llama"),
    "fp8": ("fbgemm_fp8", "compressed-tensors", "smooth_quant"),
    "int8": ("compressed-tensors", "smooth_quant"),
}


def logical_tensors(
    source: TensorSource, is_gguf: bool, quantization: Mapping[str, Any], model_format: str | None
) -> TensorSource:
    """The source's tensors with quantized ones put together, as their names and shapes say what they are.

    quantization: config.json's `quantization_config`; model_format: what the user says. Where one names another format than
    the files hold, a notice says so. Raises ModelNotSupported for formats that nothing here reads.
    """
    refuse_unsupported(source, quantization)
    found = "gguf" if is_gguf else "none"
    if any(name.endswith("_blocks") for name in source.infos):
        from lmdeploy.models.mxfp4_weights import join_mxfp4

        joined = join_mxfp4(source)
        found, source = (found if joined is source else "mxfp4"), joined
    if not is_gguf:
        from lmdeploy.models.quantized_weights import join_quantized

        source, formats = join_quantized(source, quantization)
        found = " and ".join(sorted(formats)) or found
    _notice("config.json's quant_method", quantization.get("quant_method"), found)
    _notice("model_format", model_format, found)
    return source


def refuse_unsupported(source: TensorSource, quantization: Mapping[str, Any]) -> None:
    """Raise ModelNotSupported, naming the format and what is supported."""
    method = quantization.get("quant_method", "none")
    if method not in QUANTIZATION:
        raise not_supported(f"weights quantized by {method!r} (quantization_config in config.json)")
    if quantization.get("transform_config"):
        raise not_supported("weights that need transform_config's rotations")
    for name in source.infos:
        ending = next((ending for ending in _UNSUPPORTED if name.endswith(ending)), None)
        if ending is not None:
            raise not_supported(f"{_UNSUPPORTED[ending]} weights (tensor {name!r})")


def not_supported(what: str) -> ModelNotSupported:
    """The error that says what is supported instead."""
    return ModelNotSupported(f"{what} are not supported yet; supported: {', '.join(sorted(QUANTIZATION))}")


def _notice(who: str, claimed: str | None, found: str) -> None:
    if claimed is not None and claimed not in (found, *_OTHER_NAMES.get(found, ())):
        what = "are not quantized" if found == "none" else f"are in the format {found}"
        get_logger().warning("%s is %r, but the weights %s; they are loaded as what they are", who, claimed, what)
