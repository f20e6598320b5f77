"""The config keys of models whose layers differ: which see a window of keys only, and how those rotate. It computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmdeploy.errors import ConfigError
from lmdeploy.models.rope_config import RopeConfig, read_rope, rope_parameters


def windows_by_layer(hf: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """The window of each layer, from layer_types, sliding_window_pattern, max_window_layers or for all layers alike."""
    window = hf["sliding_window"]
    types = hf.get("layer_types")
    if types is not None:
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != num_layers:
            raise ConfigError(
                f"layer_types {types!r} is not supported; supported: full_attention or sliding_attention for each layer"
            )
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    pattern = hf.get("sliding_window_pattern")
    if pattern is not None:
        return tuple(window if (index + 1) % pattern else None for index in range(num_layers))
    first = hf.get("max_window_layers", 0) if "use_sliding_window" in hf else 0
    return tuple(window if index >= first else None for index in range(num_layers))


def local_rope(hf: Mapping[str, Any], head_dim: int) -> RopeConfig | None:
    """The rope config of the layers with a window, if the config names one of their own."""
    if any(isinstance(value, Mapping) for value in (hf.get("rope_parameters") or {}).values()):
        return read_rope(hf, head_dim, "sliding_attention") if rope_parameters(hf, "sliding_attention") else None
    if "rope_local_base_freq" not in hf:
        return None
    plain = {key: value for key, value in hf.items() if key not in ("rope_scaling", "rope_parameters")}
    return read_rope({**plain, "rope_theta": hf["rope_local_base_freq"]}, head_dim)
