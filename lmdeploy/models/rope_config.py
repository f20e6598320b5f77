"""The rotary embedding's part of a model config: finds the rope keys, old and new. It computes no angle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmdeploy.errors import ConfigError

ROPE_ALIASES = {"none": "default", "origin": "default", "original": "default", "su": "longrope"}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the first `dim` dimensions of a head.

    kind: "default" or one of SCALINGS in rope_scalings. trained_length: tokens the model was trained with before scaling,
    beyond which `dynamic` and `longrope` change. attention_factor multiplies cos and sin. short_factor, long_factor:
    [dim / 2] divisors of the frequencies. rotate_on_read: keys are cached unrotated and all turned with the current
    length's frequencies.
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
    partial = params.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    base = RopeConfig(
        kind=kind,
        theta=positive_number({"rope_theta": hf.get("rope_theta") or 10000.0, **params}, "rope_theta"),
        dim=int(head_dim * partial),
        trained_length=int(hf.get("max_position_embeddings") or 2048),
        interleaved=bool(hf.get("rope_interleaved", False)),
    )
    if kind == "default":
        return base
    from lmdeploy.models.rope_scalings import SCALINGS

    if kind not in SCALINGS:
        raise ConfigError(f"rope_scaling type {name!r} is not supported; supported: default, {', '.join(SCALINGS)}")
    return SCALINGS[kind](base, params, hf)


def rope_parameters(hf: Mapping[str, Any], layer_type: str = "full_attention") -> Mapping[str, Any]:
    """The mapping that holds the scaling keys, {} if there is none; the one of `layer_type` if they are nested by type."""
    params = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if isinstance(params, Mapping) and params and all(isinstance(value, Mapping) for value in params.values()):
        params = params.get(layer_type, {})
    if not isinstance(params, Mapping):
        raise ConfigError(f"rope_scaling must be a mapping or null, not {params!r}")
    return {key: value for key, value in params.items() if value is not None}


def positive_number(hf: Mapping[str, Any], key: str) -> float:
    """The value of a key. Raises ConfigError, which names both, unless it is a positive number."""
    value = hf[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ConfigError(f"config key {key!r} must be a positive number, not {value!r}")
    return float(value)
