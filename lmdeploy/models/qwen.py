"""Qwen, the first generation: Llama's layers under GPT names, stretched beyond its trained length by NTK steps and logn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy.models.config import require
from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.rope_config import read_rope
from lmdeploy.models.weights import Rename, WeightMap


class QWenLMHeadModel(LlamaForCausalLM):
    """https://arxiv.org/abs/2309.16609. The config's intermediate size counts gate and up together."""

    config_keys = {
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "ffn_hidden_size": "intermediate_size",
        "kv_channels": "head_dim",
        "rotary_emb_base": "rope_theta",
        "rotary_pct": "partial_rotary_factor",
        "padded_vocab_size": "vocab_size",
    }
    config_defaults = {"intermediate_size": 22016}

    weight_map = WeightMap(
        Rename(r"^transformer\.wte\.", "embed_tokens."),
        Rename(r"^transformer\.ln_f\.", "norm."),
        Rename(r"^transformer\.h\.", "layers."),
        Rename(r"\.ln_1\.", ".input_layernorm."),
        Rename(r"\.ln_2\.", ".post_attention_layernorm."),
        Rename(r"\.attn\.c_attn\.", ".self_attn.qkv_proj."),
        Rename(r"\.attn\.c_proj\.", ".self_attn.o_proj."),
        Rename(r"\.mlp\.w2\.", ".mlp.gate_proj."),
        Rename(r"\.mlp\.w1\.", ".mlp.up_proj."),
        Rename(r"\.mlp\.c_proj\.", ".mlp.down_proj."),
        *LlamaForCausalLM.weight_map.rules,
    )

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        require(hf, no_bias=True)
        trained = int(hf.get("seq_length") or 8192)
        kind = "dynamic_by_prompt" if hf.get("use_dynamic_ntk") else "default"
        head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        usual = {**hf, "max_position_embeddings": trained, "rope_scaling": {"type": kind, "factor": 1.0}}
        return {
            "intermediate_size": hf["intermediate_size"] // 2,
            "qkv_bias": True,
            "rope": read_rope(usual, head_dim),
            "logn_length": trained if hf.get("use_logn_attn") else None,
        }
