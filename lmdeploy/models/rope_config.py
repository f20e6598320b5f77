"""The rotary embedding's part of a model config. It owns the reading of rope keys, old and new, and computes no angle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lmdeploy.errors import ConfigError

ROPE_ALIASES = {"none": "default", "origin": "default", "original": "default", "su": "longrope"}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the first `dim` dimensions of a head.

    kind: one of ROPE_KINDS. trained_length: tokens the model was trained with before scaling, beyond which `dynamic` and
    `longrope` change. attention_factor multiplies cos and sin. short_factor, long_factor: [dim / 2] divisors of the
    frequencies. rotate_on_read: keys are cached unrotated and all turned with the current length's frequencies.
    """

    kind: str
    theta: float
    dim: int
    trained_length: int
    interleaved: bool = False
    factor: float = 1.0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rotate_on_read: bool = False


def read_rope(hf: Mapping[str, Any], head_dim: int, layer_type: str = "full_attention") -> RopeConfig:
    """The rope config of layers of one type, from `rope_theta` and `rope_scaling`, or from `rope_parameters`.

    hf: a HF config with the usual names. Raises ConfigError for an unknown type or a missing factor.
    """
    params = rope_parameters(hf, layer_type)
    name = str(params.get("rope_type", params.get("type", "default")))
    kind = ROPE_ALIASES.get(name, name)
    if kind not in ROPE_KINDS:
        raise ConfigError(f"rope_scaling type {name!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    partial = params.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    base = RopeConfig(
        kind=kind,
        theta=float(params.get("rope_theta", hf.get("rope_theta") or 10000.0)),
        dim=int(head_dim * partial),
        trained_length=int(hf.get("max_position_embeddings") or 2048),
        interleaved=bool(hf.get("rope_interleaved", False)),
    )
    return ROPE_KINDS[kind](base, params, hf)


def rope_parameters(hf: Mapping[str, Any], layer_type: str = "full_attention") -> Mapping[str, Any]:
    """The mapping that holds the scaling keys, {} if there is none; the one of `layer_type` if they are nested by type."""
    params = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if isinstance(params, Mapping) and params and all(isinstance(value, Mapping) for value in params.values()):
        params = params.get(layer_type, {})
    if not isinstance(params, Mapping):
        raise ConfigError(f"rope_scaling must be a mapping or null, not {params!r}")
    return {key: value for key, value in params.items() if value is not None}


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's logarithmic magnitude correction. https://arxiv.org/abs/2309.00071"""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _default(base: RopeConfig, params: Mapping[str, Any], hf: Mapping[str, Any]) -> RopeConfig:
    return base


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


ROPE_KINDS = {
    "default": _default,
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
