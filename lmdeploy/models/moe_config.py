"""What routed experts and latent attention add to a model config. It owns the reading of the usual expert keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmdeploy.errors import ConfigError

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
GROUP_SCORES = {"greedy": None, "gready": None, "group_limited_greedy": "max", "noaux_tc": "top2"}


@dataclass(frozen=True)
class MoEConfig:
    """Which experts a token goes to and how their answers are weighed.

    layers: per layer, whether it is routed. scoring: "softmax" or "sigmoid" over all experts, or "topk_softmax" over the chosen
    ones only. norm_power: p of the norm that the chosen weights are divided by. group_score: how a group of experts is rated
    when only top_groups of num_groups may be chosen from: its "max", or the sum of its "top2"; None without groups.
    score_bias: whether a learned bias joins the scores for the choice, not for the weights. shared_size: intermediate size of
    the expert that every token visits, 0 without; shared_gate: whether a sigmoid weighs it. clamp: bound of gate and up.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    layers: tuple[bool, ...]
    scoring: str = "softmax"
    norm_power: float | None = None
    scaling: float = 1.0
    group_score: str | None = None
    num_groups: int = 1
    top_groups: int = 1
    score_bias: bool = False
    shared_size: int = 0
    shared_gate: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    clamp: float | None = None


@dataclass(frozen=True)
class MLAConfig:
    """Sizes of multi-head latent attention; q_lora_rank None: queries are projected in one step."""

    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


def read_moe(hf: Mapping[str, Any]) -> MoEConfig:
    """The routed experts of a HF config with the usual names."""
    num_experts = next((hf[key] for key in EXPERT_KEYS if hf.get(key)), None)
    if num_experts is None:
        raise ConfigError(f"the config names no number of experts: it needs {' or '.join(EXPERT_KEYS)}")
    size = int(hf.get("moe_intermediate_size") or hf["intermediate_size"])
    group_score = _choice(hf, "topk_method", "greedy", GROUP_SCORES)
    sigmoid = _choice(hf, "scoring_func", "softmax", {"softmax": False, "sigmoid": True})
    return MoEConfig(
        num_experts=int(num_experts),
        experts_per_token=int(hf.get("num_experts_per_tok") or 2),
        intermediate_size=size,
        layers=tuple(_is_routed(hf, index) for index in range(hf["num_hidden_layers"])),
        scoring="sigmoid" if sigmoid else "softmax",
        norm_power=1.0 if hf.get("norm_topk_prob") else None,
        scaling=float(hf.get("routed_scaling_factor") or 1.0),
        group_score=group_score,
        num_groups=int(hf.get("n_group") or 1),
        top_groups=int(hf.get("topk_group") or 1),
        score_bias=hf.get("topk_method") == "noaux_tc",
        shared_size=int(hf.get("shared_expert_intermediate_size") or size * (hf.get("n_shared_experts") or 0)),
    )


def _is_routed(hf: Mapping[str, Any], index: int) -> bool:
    if index in (hf.get("mlp_only_layers") or ()) or (index + 1) % (hf.get("decoder_sparse_step") or 1):
        return False
    return index >= (hf.get("first_k_dense_replace") or 0) and index % (hf.get("moe_layer_freq") or 1) == 0


def _choice(hf: Mapping[str, Any], key: str, default: str, table: Mapping[str, Any]) -> Any:
    name = hf.get(key) or default
    if name not in table:
        raise ConfigError(f"{key} {name!r} is not supported; supported: {', '.join(table)}")
    return table[name]
