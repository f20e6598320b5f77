"""DeepSeek-MoE: Llama whose later layers route to many small experts beside shared ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy.models.llama import LlamaForCausalLM
from lmdeploy.models.moe_config import read_moe
from lmdeploy.models.routed import ROUTED_WEIGHT_MAP, make_routed_mlp


class DeepseekForCausalLM(LlamaForCausalLM):
    """https://arxiv.org/abs/2401.06066"""

    weight_map = ROUTED_WEIGHT_MAP
    make_mlp = make_routed_mlp

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"moe": read_moe(hf)}
