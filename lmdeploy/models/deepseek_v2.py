"""DeepSeek-V2 and V3: latent attention over a compressed cache, experts chosen within groups."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lmdeploy.layers.latent_attention import LatentAttention
from lmdeploy.models.base import CausalLM
from lmdeploy.models.config import ModelConfig
from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.moe_config import MLAConfig, read_moe
from lmdeploy.models.rope_config import read_rope, rope_parameters
from lmdeploy.models.rope_scalings import mscale
from lmdeploy.models.routed import ROUTED_WEIGHT_MAP, make_routed_mlp
from lmdeploy.models.weights import Piece, Rename, Stack, WeightMap


class SkipExtraLayers:
    """A weight-map rule: layers beyond the model's own predict further tokens for speculation and are left out."""

    def apply(self, piece: Piece, config: ModelConfig) -> Sequence[Piece]:
        match = re.match(r"model\.layers\.(\d+)\.", piece.name)
        return () if match and int(match[1]) >= config.num_layers else (piece,)


LATENT_WEIGHT_MAP = WeightMap(
    SkipExtraLayers(),
    Rename(r"\.self_attn\.q_proj\.", ".self_attn.q_a_proj."),
    Rename(r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.router.score_bias"),
    Stack("self_attn.qkv_a_proj", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")),
    *ROUTED_WEIGHT_MAP.rules,
)


def make_latent_attention(model: CausalLM, index: int) -> nn.Module:
    """`make_attention` of both generations."""
    config = model.config
    assert config.mla is not None
    assert model.rotary is not None
    return LatentAttention(config, config.mla, index, model.rotary)


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

    weight_map = LATENT_WEIGHT_MAP
    make_attention = make_latent_attention
    make_mlp = make_routed_mlp
    config_defaults = {"rope_interleaved": True}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        moe = read_moe(hf)
        return {**latent_fields(hf), "moe": moe if moe.norm_power is None else replace(moe, scaling=1.0)}


class DeepseekV3ForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2412.19437"""

    weight_map = LATENT_WEIGHT_MAP
    make_attention = make_latent_attention
    make_mlp = make_routed_mlp
    config_defaults = {"rope_interleaved": True}

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {**latent_fields(hf), "moe": read_moe(hf)}
