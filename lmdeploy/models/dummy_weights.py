"""Random weights for a built model, to measure speed without a checkpoint. It reads no file."""

from __future__ import annotations

import torch

from lmdeploy.layers.linear import Linear
from lmdeploy.layers.norm import LayerNorm, RMSNorm
from lmdeploy.models.base import CausalLM
from lmdeploy.models.filling import find_slots, materialize
from lmdeploy.quantization import choose_method

_SEED = 0
_BIAS_SCALE = 0.02


def fill_at_random(model: CausalLM, device: torch.device, dtype: torch.dtype) -> None:
    """Random weights, the same at every call: rows of unit length on average, small biases, norms that scale by 1."""
    generator = torch.Generator(device).manual_seed(_SEED)
    for slot in find_slots(model).values():
        module = slot.module
        if isinstance(module, Linear) and slot.is_linear_weight:
            module.method = choose_method(("dense",), device, dtype)
            for part, rows in enumerate(slot.parts):
                weight = torch.empty(rows, module.in_features, dtype=dtype, device=device)
                weight.normal_(0, module.in_features**-0.5, generator=generator)
                module.method.load(module, part, weight, device, dtype)
            module.method.finish(module)
        elif isinstance(module, (RMSNorm, LayerNorm)):
            scale = 1 - getattr(module, "offset", 0.0)
            materialize(slot, device, dtype).fill_(scale if slot.leaf == "weight" else 0.0)
        else:
            parameter = materialize(slot, device, dtype)
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else _BIAS_SCALE
            parameter.normal_(0, scale, generator=generator)
