"""Arguments that older versions of `pipeline` took directly, translated into today's configs. It starts no engine."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from lmdeploy.chat_template.config import ChatTemplateConfig
from lmdeploy.chat_template.named import find_template
from lmdeploy.errors import ConfigError
from lmdeploy.logging import get_logger
from lmdeploy.messages import PublicConfig, TurbomindEngineConfig

# They say what the model's files say themselves, or set up what there is no more.
_WITHOUT_EFFECT = ("group_size", "instance_num", "vision_config")


def merge_old_kwargs(config: PublicConfig | None, kwargs: dict[str, Any]) -> PublicConfig:
    """A copy of the config with engine settings that older versions passed to `pipeline` directly.

    Raises ConfigError for a name that is no field of the config, with the closest ones.
    """
    config = config or TurbomindEngineConfig()
    for name in _WITHOUT_EFFECT:
        if kwargs.get(name) is not None:
            get_logger().info("argument %s has no effect: the model's own files say it, or nothing needs it", name)
    kwargs = {name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT}
    known = {f.name: getattr(config, f.name) for f in fields(config)}
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known, 3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ConfigError(f"unknown argument {name}={kwargs[name]!r}{hint}")
    return type(config)(**{**known, **kwargs})


def template_of(model_name: str | None) -> ChatTemplateConfig | None:
    """The template that `model_name` named up to version 0.5, where it could also be the model's path."""
    if model_name is None or find_template(model_name) is None:
        if model_name is not None:
            get_logger().warning("model_name=%r names no chat template: the model's own is used", model_name)
        return None
    return ChatTemplateConfig(model_name=model_name)
