"""Qwen3 and its mixture of experts: Llama with a norm on each head's queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.moe_config import read_moe
from lmdeploy.models.routed import ROUTED_WEIGHT_MAP, make_routed_mlp


class Qwen3ForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2505.09388"""

    config_defaults = {"use_sliding_window": False}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"qk_norm": True}


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    """The same with routed experts."""

    weight_map = ROUTED_WEIGHT_MAP
    make_mlp = make_routed_mlp
    config_defaults = {"use_sliding_window": False}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"qk_norm": True, "moe": read_moe(hf)}
