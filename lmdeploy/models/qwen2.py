"""Qwen1.5, Qwen2 and Qwen2.5, and their mixtures of experts: Llama with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.moe_config import read_moe
from lmdeploy.models.routed import ROUTED_WEIGHT_MAP, make_routed_mlp


class Qwen2ForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2407.10671"""

    config_defaults = {"use_sliding_window": False}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"qkv_bias": True}


class Qwen2MoeForCausalLM(LlamaForCausalLM):
    """Routed experts beside a shared one that a sigmoid weighs."""

    weight_map = ROUTED_WEIGHT_MAP
    make_mlp = make_routed_mlp
    config_defaults = {"use_sliding_window": False}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"qkv_bias": True, "moe": replace(read_moe(hf), shared_gate=True)}
