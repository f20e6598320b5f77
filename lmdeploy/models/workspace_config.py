"""The keys of a workspace's config.ini that say what the model is: from a ModelConfig and back. It knows no engine setting."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lmdeploy.models.config import ModelConfig, RopeConfig, read_hf_config
from lmdeploy.workspace import ConfigIni, Value

_POSITIVE = ("norm_eps", "rope_theta", "max_position_embeddings")
_DYNAMIC = ("dynamic", "dynamic_by_prompt")
_WEIGHT_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def model_keys(config: ModelConfig) -> dict[str, Value]:
    """Key -> value as config.ini spells it. rotary_embedding and rope_theta are 0 for a model without a rotary embedding."""
    rope = config.rope
    is_dynamic = rope is not None and rope.kind in _DYNAMIC
    quantization = config.quantization or {}
    bits = quantization.get("bits") or quantization.get("w_bit")
    weight_type = f"int{bits}" if bits else quantization.get("quant_method")
    return {
        "head_num": config.num_heads,
        "kv_head_num": config.num_kv_heads,
        "size_per_head": config.head_dim,
        "vocab_size": config.vocab_size,
        "num_layer": config.num_layers,
        "inter_size": config.intermediate_size,
        "attn_bias": int(config.qkv_bias),
        "weight_type": str(weight_type or _WEIGHT_TYPES.get(config.dtype or "", "bf16")),
        "group_size": int(quantization.get("group_size") or quantization.get("q_group_size") or 0),
        "rotary_embedding": 0 if rope is None else rope.dim,
        "start_id": -1 if config.bos_token_id is None else config.bos_token_id,
        "end_id": config.eos_token_ids[0] if config.eos_token_ids else -1,
        "norm_eps": float(config.norm_eps),
        "rope_theta": 0.0 if rope is None else float(rope.theta),
        "max_position_embeddings": config.max_position_embeddings,
        "rope_scaling_factor": float(rope.factor) if is_dynamic and rope is not None else 0.0,
        "use_dynamic_ntk": int(is_dynamic),
        "use_logn_attn": int(config.logn_length is not None),
    }


def edited(config: ModelConfig, weights: Path) -> ModelConfig:
    """The config under the keys of config.ini that differ from what the model's config.json says.

    A key that `config` already has from somewhere else than config.json stays. Raises ConfigError for a value that cannot be
    used, and for an edit of what the weights themselves fix.
    """
    ini = ConfigIni(weights)
    own, now = model_keys(ModelConfig.from_hf(read_hf_config(weights))), model_keys(config)
    changes: dict[str, Value] = {}
    for key, value in own.items():
        wanted = ini.like(key, value)
        if wanted is not None and wanted != value and now[key] == value:
            changes[key] = wanted
    for key, value in changes.items():
        if key not in _EDITS:
            raise ini.error(key, f"the weights were made with {own[key]}; put that back, or convert another model")
        if float(value) < 0 or (float(value) == 0 and key in _POSITIVE) or not math.isfinite(float(value)):
            raise ini.error(key, f"give a number {'above' if key in _POSITIVE else 'from'} 0")
        if config.rope is None and "rope" in key:
            raise ini.error(key, "this model has no rotary embedding; put 0.0 back")
    if changes.get("use_dynamic_ntk") and not ini.number("rope_scaling_factor"):
        changes["rope_scaling_factor"] = 1.0
    for key, edit in _EDITS.items():
        if key in changes:
            config = edit(config, float(changes[key]))
    return config


def _with_rope(config: ModelConfig, change: Callable[[RopeConfig], RopeConfig]) -> ModelConfig:
    return config if config.rope is None else replace(config, rope=change(config.rope))


def _set_length(config: ModelConfig, length: float) -> ModelConfig:
    """The trained length, and what was reckoned from it."""
    old, new = config.max_position_embeddings, int(length)
    config = _with_rope(config, lambda rope: replace(rope, trained_length=new) if rope.trained_length == old else rope)
    logn_length = new if config.logn_length == old else config.logn_length
    return replace(config, max_position_embeddings=new, logn_length=logn_length)


def _scale_rope(config: ModelConfig, factor: float) -> ModelConfig:
    """Dynamic NTK scaling with this factor; 0 turns it off."""
    if factor > 0:
        return config.with_long_context(factor)
    return _with_rope(config, lambda rope: replace(rope, kind="default", factor=1.0) if rope.kind in _DYNAMIC else rope)


def _use_logn(config: ModelConfig, is_on: float) -> ModelConfig:
    return config.with_long_context(0.0, True) if is_on else replace(config, logn_length=None)


# What each key changes, in the order in which the changes are made.
_EDITS: dict[str, Callable[[ModelConfig, float], ModelConfig]] = {
    "end_id": lambda config, token_id: replace(config, eos_token_ids=(int(token_id),)),
    "norm_eps": lambda config, eps: replace(config, norm_eps=eps),
    "rope_theta": lambda config, theta: _with_rope(config, lambda rope: replace(rope, theta=theta)),
    "max_position_embeddings": _set_length,
    "use_dynamic_ntk": lambda config, is_on: config if is_on else _scale_rope(config, 0.0),
    "rope_scaling_factor": _scale_rope,
    "use_logn_attn": _use_logn,
}
