"""Commands to an engine as a whole: sleep, wake, take other weights. It owns no tensor and runs no step."""

from __future__ import annotations

import gc
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from lmdeploy.errors import CheckpointError, ConfigError, EngineDead, LMDeployError
from lmdeploy.logging import get_logger

if TYPE_CHECKING:
    from lmdeploy.engine.core import Engine
    from lmdeploy.engine.request import RequestOutput

TAGS = frozenset({"weights", "kv_cache"})
# What must not change with the weights: the cache, the plan and the clients are made for it.
_FIXED = ("architecture", "num_layers", "hidden_size", "vocab_size", "kv_shape")


class Sleep(msgspec.Struct, tag=True):
    """Give the KV cache back; on a GPU, and at level 2, the weights, too."""

    level: int = 1


class Wake(msgspec.Struct, tag=True):
    """Take it all again, or what `tags` names. Weights that were given back are read from their files."""

    tags: list[str] = msgspec.field(default_factory=lambda: sorted(TAGS))


class UpdateWeights(msgspec.Struct, tag=True):
    """Replace the weights by those of a folder with config.json and safetensors files, of the same shapes."""

    path: str


Command = Sleep | Wake | UpdateWeights


@dataclass(frozen=True)
class Order:
    """A command on its way to the engine's thread, and where its end is told."""

    command: Command
    done: Future[None] = field(default_factory=Future)

    def run(self, engine: Engine) -> list[RequestOutput]:
        """Obey; returns the last outputs of requests that this ended. An error is the asker's."""
        try:
            outputs = _obey(engine, self.command)
        except LMDeployError as error:
            self.done.set_exception(error)
            return []
        except BaseException:
            self.fail(EngineDead("the engine has stopped"))
            raise
        self.done.set_result(None)
        return outputs

    def fail(self, error: EngineDead) -> None:
        if not self.done.done():
            self.done.set_exception(error)


def _obey(engine: Engine, command: Command) -> list[RequestOutput]:
    if isinstance(command, Sleep):
        return _sleep(engine, command.level)
    if isinstance(command, Wake):
        _wake(engine, frozenset(command.tags))
        return []
    return _update(engine, Path(command.path))


def _sleep(engine: Engine, level: int) -> list[RequestOutput]:
    if level not in (1, 2):
        raise ConfigError(f"level={level}: sleep at level 1 or 2")
    outputs = engine.abort_all()
    engine.scheduler.blocks.forget_all()
    if "kv_cache" not in engine.asleep:
        engine.drop_runner()
    if level == 2 or engine.device.type != "cpu":
        engine.resting_model = None
    engine.asleep = set(TAGS)
    _free()
    return outputs


def _wake(engine: Engine, tags: frozenset[str]) -> None:
    if unknown := tags - TAGS:
        raise ConfigError(f"tags={sorted(unknown)}: there are {', '.join(sorted(TAGS))}")
    if "weights" in tags & engine.asleep:
        if engine.resting_model is None:
            engine.resting_model = engine.load_model()
        engine.asleep.discard("weights")
    if "kv_cache" in tags & engine.asleep:
        if "weights" in engine.asleep:
            raise ConfigError("tags=['kv_cache']: wake the weights first, or both")
        engine.start_runner()
        engine.asleep.discard("kv_cache")


def _update(engine: Engine, path: Path) -> list[RequestOutput]:
    """The old weights go before the new ones come, so that memory for one model is enough; if those fail they are read
    again."""
    _check_fits(engine, path)
    outputs = [] if engine.asleep else engine.abort_all()
    engine.scheduler.blocks.forget_all()
    was_asleep = set(engine.asleep)
    if "kv_cache" not in was_asleep:
        engine.drop_runner()
    engine.resting_model = None
    _free()
    before, engine.path = engine.path, path
    error: LMDeployError | None = None
    if "weights" not in was_asleep:
        try:
            engine.resting_model = engine.load_model()
        except LMDeployError as cause:
            get_logger().error("the new weights cannot be used, the old ones are read again: %s", cause)
            error, engine.path = cause, before
            engine.resting_model = engine.load_model()
    if "kv_cache" not in was_asleep:
        engine.start_runner()
    if error is not None:
        raise error
    return outputs


def _check_fits(engine: Engine, path: Path) -> None:
    from lmdeploy.models.config import load_config

    if not any(path.glob("*.safetensors")) or not (path / "config.json").is_file():
        raise CheckpointError(f"{path} holds no safetensors files with a config.json: give the folder of a checkpoint")
    given, own = load_config(path, engine.config.hf_overrides), engine.model_config
    for name in _FIXED:
        if getattr(given, name) != getattr(own, name):
            raise CheckpointError(
                f"{path}: {name} is {getattr(given, name)!r}, the engine's is {getattr(own, name)!r}: the weights must be "
                "those of the same model"
            )


def _free() -> None:
    gc.unfreeze()  # what the start on a GPU froze
    gc.collect()
    if torch.cuda.is_initialized():
        from lmdeploy.engine.warm_up import free_cached

        free_cached()
