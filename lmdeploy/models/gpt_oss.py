"""gpt-oss: attention sinks, alternating windows, and routed experts with biases and a clamped activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lmdeploy.models.config import ModelConfig
from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.moe_config import read_moe
from lmdeploy.models.routed import make_routed_mlp
from lmdeploy.models.weight_rules import Transform
from lmdeploy.models.weights import Rename, WeightMap


def stacked_gate_up(weight: Tensor, config: ModelConfig) -> Tensor:
    """Gate rows, then up rows of each expert, from [E, C, 2 I] or bias [E, 2 I] whose columns alternate: -> [E * 2 I, C]."""
    rows = weight.transpose(1, -1) if weight.dim() == 3 else weight
    return rows.unflatten(1, (-1, 2)).transpose(1, 2).flatten(0, 2)


def stacked_down(weight: Tensor, config: ModelConfig) -> Tensor:
    """[E, I, C] or bias [E, C] -> [E * C, I] or [E * C]."""
    return (weight.transpose(1, -1) if weight.dim() == 3 else weight).flatten(0, 1)


class GptOssForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2508.10925"""

    weight_map = WeightMap(
        Transform(r"\.mlp\.experts\.gate_up_proj", stacked_gate_up),
        Transform(r"\.mlp\.experts\.down_proj", stacked_down),
        Rename(r"\.mlp\.experts\.(gate_up|down)_proj$", r".mlp.\1_proj.weight"),
        Rename(r"\.mlp\.experts\.(gate_up|down)_proj_bias$", r".mlp.\1_proj.bias"),
        *LlamaForCausalLM.weight_map.rules,
    )
    make_mlp = make_routed_mlp
    config_defaults = {"attention_bias": True, "swiglu_limit": 7.0}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        special = {"scoring": "topk_softmax", "router_bias": True, "expert_bias": True, "clamp": hf["swiglu_limit"]}
        return {"attention_sinks": True, "moe": replace(read_moe(hf), **special)}
