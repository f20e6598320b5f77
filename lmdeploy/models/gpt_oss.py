"""gpt-oss: attention sinks, alternating windows, and routed experts with biases and a clamped activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.moe_config import read_moe


class GptOssForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2508.10925"""

    config_defaults = {"attention_bias": True, "swiglu_limit": 7.0}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        moe = read_moe(hf, hf["num_hidden_layers"])
        special = {"scoring": "topk_softmax", "router_bias": True, "expert_bias": True, "clamp": hf["swiglu_limit"]}
        return {"attention_sinks": True, "moe": moe and replace(moe, **special)}
