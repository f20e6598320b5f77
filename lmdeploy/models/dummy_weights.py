"""Random weights for a built model, to measure speed without a checkpoint. It reads no file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lmdeploy.layers.layer_norm import LayerNorm
from lmdeploy.layers.linear import Linear
from lmdeploy.layers.norm import RMSNorm
from lmdeploy.models.base import CausalLM
from lmdeploy.models.filling import find_slots, materialize
from lmdeploy.quantization import choose_method
from lmdeploy.quantization.packing import AffineTensor

_SEED = 0
_BIAS_SCALE = 0.02
_UNIFORM_SPREAD = 4.6  # standard deviation of the integers 0 .. 15


def fill_at_random(model: CausalLM, device: torch.device, dtype: torch.dtype) -> None:
    """Random weights, the same at every call: rows of unit length on average, small biases, norms that scale by 1."""
    generator = torch.Generator(device).manual_seed(_SEED)
    group_size = _group_size(model.config.quantization)
    for name, slot in find_slots(model).items():
        module = slot.module
        if isinstance(module, Linear) and slot.is_linear_weight:
            is_quantized = bool(group_size) and name.startswith("layers.") and module.in_features % group_size == 0
            module.method = choose_method(("affine4" if is_quantized else "dense",), device, dtype)
            for part, rows in enumerate(slot.parts):
                shape = (rows, module.in_features)
                value = _affine(shape, group_size, generator) if is_quantized else _dense(shape, dtype, generator)
                module.method.load(module, part, value, device, dtype)
            module.method.finish(module)
        elif isinstance(module, (RMSNorm, LayerNorm)):
            scale = 1 - getattr(module, "offset", 0.0)
            materialize(slot, device, dtype).fill_(scale if slot.leaf == "weight" else 0.0)
        else:
            parameter = materialize(slot, device, dtype)
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else _BIAS_SCALE
            parameter.normal_(0, scale, generator=generator)


def _group_size(quantization: Mapping[str, Any] | None) -> int:
    """Columns that share a scale where the config asks for 4-bit weights; 0 where it does not."""
    if not quantization or quantization.get("quant_method") not in ("awq", "gptq"):
        return 0
    return int(quantization.get("group_size", 128))


def _dense(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    weight = torch.empty(shape, dtype=dtype, device=generator.device)
    return weight.normal_(0, shape[1] ** -0.5, generator=generator)


def _affine(shape: tuple[int, int], group_size: int, generator: torch.Generator) -> AffineTensor:
    """Uniform 4-bit integers around zero 8, of the same spread as dense weights."""
    q = torch.randint(0, 16, shape, dtype=torch.uint8, device=generator.device, generator=generator)
    groups = (shape[0], shape[1] // group_size)
    scales = torch.full(groups, shape[1] ** -0.5 / _UNIFORM_SPREAD, device=generator.device).half().float()
    return AffineTensor.from_zeros(q, scales, torch.full(groups, 8, device=generator.device), 4)
