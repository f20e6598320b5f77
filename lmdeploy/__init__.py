"""The public names, loaded at first use: importing the package loads neither torch nor any other large library."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmdeploy.version import __version__

# Read when torch is first imported: its OpenMP threads sleep while they wait. Spinning, they take the cores from the CPU
# kernels' own threads, and on a busy machine loading a model took ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from lmdeploy.api import Pipeline, pipeline
    from lmdeploy.chat_template.config import ChatTemplateConfig
    from lmdeploy.messages import GenerationConfig, Response, TurbomindEngineConfig, VisionConfig
    from lmdeploy.pytorch_config import PytorchEngineConfig
    from lmdeploy.serve.launch import client, serve
    from lmdeploy.tokenizer import Tokenizer

__all__ = [
    "ChatTemplateConfig",
    "GenerationConfig",
    "Pipeline",
    "PytorchEngineConfig",
    "Response",
    "Tokenizer",
    "TurbomindEngineConfig",
    "VisionConfig",
    "__version__",
    "client",
    "pipeline",
    "serve",
]

_HOMES = {
    "ChatTemplateConfig": "lmdeploy.chat_template.config",
    "Pipeline": "lmdeploy.api",
    "pipeline": "lmdeploy.api",
    "PytorchEngineConfig": "lmdeploy.pytorch_config",
    "Tokenizer": "lmdeploy.tokenizer",
    "client": "lmdeploy.serve.launch",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "serve":  # the package of that name, which can be called
        return import_module("lmdeploy.serve")
    value = getattr(import_module(_HOMES.get(name, "lmdeploy.messages")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
