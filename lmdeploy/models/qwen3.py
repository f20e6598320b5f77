"""Qwen3 and its mixture of experts: Llama with a norm on each head's queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy.models.llama import ROUTED_WEIGHT_MAP, LlamaForCausalLM


class Qwen3ForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2505.09388"""

    config_defaults = {"use_sliding_window": False}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"qk_norm": True}


class Qwen3MoeForCausalLM(LlamaForCausalLM):
    """The same with routed experts."""

    weight_map = ROUTED_WEIGHT_MAP
    config_defaults = {"use_sliding_window": False}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"qk_norm": True}
