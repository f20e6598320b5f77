"""InternLM and InternLM3: Llama's tree, with biases and, in InternLM v1.1, keys that are cached before their rotation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.rope_config import read_rope


class InternLMForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2403.17297"""

    config_defaults = {"bias": True}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        fields: dict[str, Any] = {"qkv_bias": bool(hf["bias"]), "o_bias": bool(hf["bias"])}
        rotary = hf.get("rotary")
        if rotary is not None:
            scaling = {"type": rotary.get("type", "origin"), "factor": rotary.get("scaling_factor", 1.0)}
            usual = {**hf, "rope_theta": rotary.get("base", 10000), "rope_scaling": scaling}
            rope = read_rope(usual, hf["hidden_size"] // hf["num_attention_heads"])
            fields["rope"] = replace(rope, rotate_on_read=rope.kind == "dynamic")
        return fields


class InternLM3ForCausalLM(LlamaForCausalLM):
    """`qkv_bias` for q, k and v; `bias` for all other projections."""

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        bias = bool(hf.get("bias", False))
        return {"qkv_bias": bool(hf.get("qkv_bias", False)), "o_bias": bias, "mlp_bias": bias}
