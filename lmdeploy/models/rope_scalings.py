"""The rope keys of every scaling that stretches a model beyond its trained length. It computes no angle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lmdeploy.errors import ConfigError
from lmdeploy.models.rope_config import RopeConfig


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's logarithmic magnitude correction. https://arxiv.org/abs/2309.00071"""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _scaled(base: RopeConfig, params: Mapping[str, Any], hf: Mapping[str, Any]) -> RopeConfig:
    return replace(base, factor=_number(params, "factor", base.kind))


def _llama3(base: RopeConfig, params: Mapping[str, Any], hf: Mapping[str, Any]) -> RopeConfig:
    return replace(
        base,
        factor=_number(params, "factor", base.kind),
        low_freq_factor=_number(params, "low_freq_factor", base.kind),
        high_freq_factor=_number(params, "high_freq_factor", base.kind),
        trained_length=int(_number(params, "original_max_position_embeddings", base.kind)),
    )


def _yarn(base: RopeConfig, params: Mapping[str, Any], hf: Mapping[str, Any]) -> RopeConfig:
    factor = _number(params, "factor", base.kind)
    magnitude = params.get("attention_factor")
    if magnitude is None:
        weight, all_dims = params.get("mscale"), params.get("mscale_all_dim")
        magnitude = mscale(factor, weight) / mscale(factor, all_dims) if weight and all_dims else mscale(factor)
    return replace(
        base,
        factor=factor,
        attention_factor=float(magnitude),
        trained_length=_original_length(base, params, hf),
        beta_fast=float(params.get("beta_fast", 32.0)),
        beta_slow=float(params.get("beta_slow", 1.0)),
        truncate=bool(params.get("truncate", True)),
    )


def _longrope(base: RopeConfig, params: Mapping[str, Any], hf: Mapping[str, Any]) -> RopeConfig:
    original = _original_length(base, params, hf)
    stretch = base.trained_length / original if original < base.trained_length else float(params.get("factor", 1.0))
    magnitude = params.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return replace(
        base,
        trained_length=original,
        attention_factor=float(magnitude),
        short_factor=_divisors(params, "short_factor", base.dim),
        long_factor=_divisors(params, "long_factor", base.dim),
    )


SCALINGS = {
    "linear": _scaled,
    "dynamic": _scaled,
    "dynamic_by_prompt": _scaled,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _original_length(base: RopeConfig, params: Mapping[str, Any], hf: Mapping[str, Any]) -> int:
    key = "original_max_position_embeddings"
    return int(params.get(key) or hf.get(key) or base.trained_length)


def _number(params: Mapping[str, Any], key: str, kind: str) -> float:
    value = params.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ConfigError(f"rope_scaling of type {kind!r} needs a positive number {key!r}, not {value!r}")
    return float(value)


def _divisors(params: Mapping[str, Any], key: str, dim: int) -> tuple[float, ...]:
    values = params.get(key)
    if not isinstance(values, (list, tuple)) or len(values) != dim // 2:
        found = f"{len(values)} numbers" if isinstance(values, (list, tuple)) else repr(values)
        raise ConfigError(f"rope_scaling of type 'longrope' needs {dim // 2} numbers {key!r}, not {found}")
    return tuple(float(value) for value in values)
