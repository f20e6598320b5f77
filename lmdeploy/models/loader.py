"""Builds a model and fills it from a checkpoint, or with random numbers. It knows no format and no family's names.

The model is built on torch's meta device; every parameter comes into being on its own device, in its own dtype, when its
tensor is read, so that beside the model there is never more than one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lmdeploy.errors import ConfigError
from lmdeploy.local_file import refuse_pointer
from lmdeploy.logging import get_logger
from lmdeploy.models import model_class
from lmdeploy.models.base import CausalLM
from lmdeploy.models.checkpoint import open_checkpoint
from lmdeploy.models.config import ModelConfig, load_config
from lmdeploy.models.filling import fill
from lmdeploy.models.weights import WeightMap

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def load_model(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    load_format: str = "auto",
    hf_overrides: Mapping[str, Any] | None = None,
    rope_scaling_factor: float = 0.0,
    use_logn_attn: bool = False,
    model_format: str | None = None,
) -> CausalLM:
    """The model in a Hugging Face folder or a GGUF file, ready to run on `device`.

    dtype: as `choose_dtype`. load_format: "auto", or "dummy" for random weights from the config alone. hf_overrides replaces
    keys of config.json. model_format: the weights' format as the user knows it; a notice says if the files hold another one.
    Raises CheckpointError, ConfigError or ModelNotSupported.
    """
    if load_format not in ("auto", "dummy"):
        raise ConfigError(f"load_format={load_format!r}: use auto or dummy")
    path, device = Path(path), torch.device(device)
    if path.is_file():
        refuse_pointer(path)
    config = load_config(path, hf_overrides).with_long_context(rope_scaling_factor, use_logn_attn)
    model = build_model(config)
    compute_dtype = choose_dtype(dtype, config, device)
    if load_format == "dummy":
        from lmdeploy.models.dummy_weights import fill_at_random

        fill_at_random(model, device, compute_dtype)
    else:
        checkpoint = open_checkpoint(path, config.quantization, model_format)
        fill(model, checkpoint, _weight_map(model, path), device, compute_dtype)
    return model


def build_model(config: ModelConfig) -> CausalLM:
    """The module tree on the meta device: shapes without memory."""
    with torch.device("meta"):
        return model_class(config.architecture)(config).eval().requires_grad_(False)


def choose_dtype(dtype: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The compute dtype. auto: on a GPU the checkpoint's 16-bit type, bfloat16 where it has none; on a CPU bfloat16 if the CPU
    multiplies it natively, else float32. A CPU computes no float16: it gets what auto gives, and a notice says so.
    """
    if dtype not in ("auto", *_DTYPES):
        raise ConfigError(f"dtype={dtype!r}: use auto, {', '.join(_DTYPES)}")
    if device.type != "cpu":
        name = config.dtype if dtype == "auto" else dtype
        chosen = _DTYPES.get(name or "", torch.bfloat16)
        return torch.bfloat16 if dtype == "auto" and chosen == torch.float32 else chosen
    if dtype in ("bfloat16", "float32"):
        return _DTYPES[dtype]
    chosen = torch.bfloat16 if has_native_bfloat16() else torch.float32
    if dtype == "float16":
        get_logger().warning("dtype=float16 is not for CPUs; computing in %s", str(chosen).removeprefix("torch."))
    return chosen


def has_native_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 (AVX-512 BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _weight_map(model: CausalLM, path: Path) -> WeightMap:
    if not path.is_file():
        return model.weight_map
    from lmdeploy.models.gguf_weights import gguf_rules

    return WeightMap(*gguf_rules(model.config.model_type), *model.weight_map.rules)
