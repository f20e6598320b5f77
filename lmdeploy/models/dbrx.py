"""DBRX: fine-grained routed experts, LayerNorm without bias, clipped q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lmdeploy.layers.layer_norm import LayerNorm
from lmdeploy.layers.norm import Norm
from lmdeploy.models.config import ModelConfig
from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.moe_config import read_moe
from lmdeploy.models.routed import make_routed_mlp
from lmdeploy.models.weight_rules import ExpertRows, Transform
from lmdeploy.models.weights import Rename, WeightMap


def transposed_experts(weight: Tensor, config: ModelConfig) -> Tensor:
    """The last projection of all experts is stored input first: [E * I, C] -> [E * C, I]."""
    return weight.unflatten(0, (-1, config.intermediate_size)).transpose(1, 2).flatten(0, 1)


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

    weight_map = WeightMap(
        Rename(r"^transformer\.wte\.", "embed_tokens."),
        Rename(r"^transformer\.norm_f\.", "norm."),
        Rename(r"^transformer\.blocks\.", "layers."),
        Rename(r"\.norm_attn_norm\.norm_1\.", ".input_layernorm."),
        Rename(r"\.norm_attn_norm\.norm_2\.", ".post_attention_layernorm."),
        Rename(r"\.norm_attn_norm\.attn\.Wqkv\.", ".self_attn.qkv_proj."),
        Rename(r"\.norm_attn_norm\.attn\.out_proj\.", ".self_attn.o_proj."),
        Rename(r"\.ffn\.router\.layer\.", ".mlp.router."),
        ExpertRows(r"\.ffn\.experts\.mlp\.w1$", ".mlp.gate_up_proj.weight", slot=0, slots=2),
        ExpertRows(r"\.ffn\.experts\.mlp\.v1$", ".mlp.gate_up_proj.weight", slot=1, slots=2),
        Transform(r"\.ffn\.experts\.mlp\.w2$", transposed_experts),
        Rename(r"\.ffn\.experts\.mlp\.w2$", ".mlp.down_proj.weight"),
    )
    make_mlp = make_routed_mlp

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        moe = replace(read_moe(hf), norm_power=hf["moe_normalize_expert_weights"])
        return {"clip_qkv": hf.get("clip_qkv"), "moe": moe}

    def make_norm(self) -> Norm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps, bias=False)
