"""DeepSeek-V2 and V3: latent attention over a compressed cache, experts chosen within groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.moe_config import MLAConfig, read_moe
from lmdeploy.models.rope_config import mscale, read_rope, rope_parameters


def latent_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes, rotation and scale of latent attention; YaRN's magnitude also enters the scale, squared."""
    mla = MLAConfig(
        q_lora_rank=hf.get("q_lora_rank"),
        kv_lora_rank=hf["kv_lora_rank"],
        nope_dim=hf["qk_nope_head_dim"],
        rope_dim=hf["qk_rope_head_dim"],
        value_dim=hf["v_head_dim"],
    )
    head_dim = mla.nope_dim + mla.rope_dim
    scaling = rope_parameters(hf)
    magnitude = mscale(scaling.get("factor", 1.0), scaling.get("mscale_all_dim", 0.0))
    return {
        "mla": mla,
        "head_dim": head_dim,
        "rope": read_rope(hf, mla.rope_dim),
        "attention_scale": head_dim**-0.5 * magnitude**2,
    }


class DeepseekV2ForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2405.04434. Chosen weights are normalized or scaled, never both."""

    config_defaults = {"rope_interleaved": True}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        moe = read_moe(hf, hf["num_hidden_layers"])
        if moe is not None and moe.norm_power is not None:
            moe = replace(moe, scaling=1.0)
        return {**latent_fields(hf), "moe": moe}


class DeepseekV3ForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2412.19437"""

    config_defaults = {"rope_interleaved": True}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return latent_fields(hf)
