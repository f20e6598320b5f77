"""The engine's own settings for prompts beyond the trained length, applied to a model's config. It computes no angle."""

from __future__ import annotations

from dataclasses import replace

from lmdeploy.errors import ConfigError
from lmdeploy.models.config import ModelConfig, RopeConfig


def stretch(config: ModelConfig, rope_scaling_factor: float, use_logn_attn: bool) -> ModelConfig:
    """As ModelConfig.with_long_context. Raises ConfigError for a model without a rotary embedding."""
    rope, trained_length = config.rope, config.max_position_embeddings
    if rope is None:
        raise ConfigError(
            f"{config.architecture} has no rotary embedding: rope_scaling_factor and use_logn_attn do not apply"
        )
    if rope_scaling_factor > 0:
        config = replace(config, rope=_dynamic(rope, rope_scaling_factor, trained_length))
    if use_logn_attn and config.logn_length is None:
        config = replace(config, logn_length=trained_length)
    return config


def _dynamic(rope: RopeConfig, factor: float, trained_length: int) -> RopeConfig:
    if rope.kind in ("dynamic", "dynamic_by_prompt"):
        return rope if factor == 1 else replace(rope, factor=factor)
    return replace(rope, kind="dynamic", factor=factor, trained_length=trained_length, attention_factor=1.0)
