"""DBRX: fine-grained routed experts, LayerNorm without bias, clipped q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lmdeploy.layers.norm import LayerNorm, Norm
from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.moe_config import read_moe


class DbrxForCausalLM(LlamaForCausalLM):
    """https://www.databricks.com/blog/introducing-dbrx-new-state-art-open-llm"""

    config_keys = {
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers",
        "max_seq_len": "max_position_embeddings",
        "attn_config.kv_n_heads": "num_key_value_heads",
        "attn_config.rope_theta": "rope_theta",
        "attn_config.clip_qkv": "clip_qkv",
        "ffn_config.ffn_hidden_size": "intermediate_size",
        "ffn_config.moe_num_experts": "num_experts",
        "ffn_config.moe_top_k": "num_experts_per_tok",
        "ffn_config.moe_normalize_expert_weights": "moe_normalize_expert_weights",
        "ffn_config.ffn_act_fn.name": "hidden_act",
    }
    config_defaults = {"layer_norm_epsilon": 1e-5, "moe_normalize_expert_weights": 1.0}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        moe = read_moe(hf, hf["num_hidden_layers"])
        power = hf["moe_normalize_expert_weights"]
        return {"clip_qkv": hf.get("clip_qkv"), "moe": moe and replace(moe, norm_power=power)}

    def make_norm(self) -> Norm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, bias=False)
