"""What a workspace's config.ini sets for whoever runs it: engine settings and the chat template. It starts no engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lmdeploy.chat_template.config import ChatTemplateConfig
from lmdeploy.chat_template.named import TEMPLATE_ALIASES, find_template
from lmdeploy.engine.config import EngineConfig, read_quant_policy
from lmdeploy.errors import ConfigError
from lmdeploy.logging import get_logger
from lmdeploy.messages import QuantPolicy
from lmdeploy.models.config import ModelConfig, load_config, read_hf_config
from lmdeploy.models.workspace_config import model_keys
from lmdeploy.workspace import ConfigIni, Value, has_kv_scales

DEFAULT_CACHE_SHARE = 0.8
_MAX_BATCH_SIZE = 64
# Of TurboMind's own kernels and buffers: they stand in config.ini for those who look for them.
_WITHOUT_EFFECT: dict[str, Value] = {"step_length": 1, "cache_chunk_size": -1, "use_context_fmha": 1}


def config_ini_values(model_name: str, config: ModelConfig, dtype: str) -> dict[str, Value]:
    """All keys of a new workspace's config.ini. model_name: a chat template's name; dtype: as EngineConfig has it."""
    model = model_keys(config)
    rope = {key: model.pop(key) for key in ("max_position_embeddings", "rope_scaling_factor", "use_dynamic_ntk")}
    rope["use_logn_attn"] = model.pop("use_logn_attn")
    return {
        "model_name": model_name,
        "tensor_para_size": 1,
        **model,
        "data_type": dtype,
        "session_len": config.session_len,
        "max_batch_size": _MAX_BATCH_SIZE,
        "max_context_token_num": 1,
        "cache_max_entry_count": DEFAULT_CACHE_SHARE,
        "cache_block_seq_len": EngineConfig.block_size,
        "quant_policy": 0,
        **_WITHOUT_EFFECT,
        **rope,
    }


def check_template_name(name: str) -> None:
    """Raise ConfigError unless a chat template has this name; `hf` is the model's own."""
    if name != "hf" and find_template(name) is None:
        import difflib

        from lmdeploy.chat_template.named import CHAT_TEMPLATES

        close = difflib.get_close_matches(name, [*CHAT_TEMPLATES, *TEMPLATE_ALIASES], 3, 0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ConfigError(f"no chat template is named {name!r}; {hint}`lmdeploy list` shows all, hf is the model's own")


def with_workspace(
    weights: Path, config: EngineConfig, template: ChatTemplateConfig | str | None
) -> tuple[EngineConfig, ChatTemplateConfig | str | None]:
    """Engine config and chat template under a workspace's config.ini: what the caller gave stays, all else is filled in.

    weights: the folder with config.ini. Raises ConfigError for a value that cannot be used.
    """
    return with_engine_settings(weights, config), with_template(weights, template)


def with_template(weights: Path, template: ChatTemplateConfig | str | None) -> ChatTemplateConfig | str | None:
    """The asked for template, or the one of model_name, with the parts that were asked for."""
    if isinstance(template, str) or (template is not None and (template.model_name or template.model_path)):
        return template
    ini = ConfigIni(weights)
    name = ini.text("model_name")
    if name is None:
        return template
    try:
        check_template_name(name)
    except ConfigError as error:
        raise ini.error("model_name", str(error)) from None
    return replace(template or ChatTemplateConfig(), model_name=name)


def with_engine_settings(weights: Path, config: EngineConfig) -> EngineConfig:
    """The config with the settings of config.ini for all that is not in `config.given`."""
    ini = ConfigIni(weights)
    _tell_differences(ini, weights)
    if (ini.integer("tensor_para_size") or 1) != 1:
        raise ini.error("tensor_para_size", "more than one GPU is not supported yet; put 1 back")
    settings: dict[str, Any] = {
        "session_len": ini.integer("session_len"),
        "max_batch_size": ini.integer("max_batch_size"),
        "block_size": ini.integer("cache_block_seq_len"),
        "max_prefill_token_num": _prefill_tokens(ini),
        "quant_policy": _quant_policy(ini),
        "dtype": ini.text("data_type"),
    }
    given = {name: value for name, value in settings.items() if value is not None and name not in config.given}
    try:
        config = replace(config, **given)
        if "cache_max_entry_count" not in config.given:
            config = replace(config, cache_max_entry_count=_cache_size(ini, weights, config))
    except ConfigError as error:
        raise ConfigError(f"{ini.path}: {error}") from error
    if config.quant_policy == QuantPolicy.INT4 and has_kv_scales(weights):
        get_logger().warning(
            "quant_policy 4 is int8 here, as its time meant: %s holds KV scales of `lite kv_qparams`. They are not used: "
            "the cache is quantized as it is written",
            weights,
        )
        config = replace(config, quant_policy=QuantPolicy.INT8)
    return config


def _prefill_tokens(ini: ConfigIni) -> int | None:
    tokens = ini.integer("max_context_token_num")
    return None if tokens == 1 else tokens


def _quant_policy(ini: ConfigIni) -> QuantPolicy | None:
    text = ini.text("quant_policy")
    if text is None:
        return None
    try:
        return read_quant_policy(text)
    except ConfigError as error:
        raise ConfigError(f"{ini.path}: {error}") from None


def _cache_size(ini: ConfigIni, weights: Path, config: EngineConfig) -> float | None:
    """A share of the free memory, or a number of blocks: of 0.0.x a whole number, and then one of whole sessions.

    The default share is the engine's own choice, as in its config classes.
    """
    value = ini.number("cache_max_entry_count")
    if value is None or value == DEFAULT_CACHE_SHARE:
        return None
    if isinstance(value, float) or value < 1:
        return value
    session_len = config.session_len or load_config(weights, config.hf_overrides).session_len
    return value * -(-session_len // config.block_size)


def _tell_differences(ini: ConfigIni, weights: Path) -> None:
    """Edits that are in force, and keys that nothing reads."""
    fresh = config_ini_values("", ModelConfig.from_hf(read_hf_config(weights)), "auto")
    del fresh["model_name"]
    edits = [key for key, value in fresh.items() if key not in _WITHOUT_EFFECT and ini.has_other(key, value)]
    if edits:
        shown = ", ".join(f"{key} = {ini.text(key)}" for key in edits)
        get_logger().warning("%s: edited settings are in force unless flags say otherwise: %s", ini.path, shown)
    for key, close in ini.unknown([*fresh, "model_name"]).items():
        hint = f"; did you mean {close}?" if close else ""
        get_logger().warning("%s: the key %s has no effect%s", ini.path, key, hint)
