"""`lmdeploy lite calibrate`: runs a model over some text and writes the statistics of its activations, keys and values.

The files are those of LMDeploy 0.1 to 0.3, dictionaries of plain tensors, statistic -> module -> [C]: inputs_stats.pth and
outputs_stats.pth by linear; key_stats.pth and value_stats.pth by decoder layer, [Hkv, D]. It quantizes nothing.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.lite import naming
from lmdeploy.lite.bar import progress_bar
from lmdeploy.lite.export import full_disk_is_an_error
from lmdeploy.lite.layer import check_finite
from lmdeploy.lite.observers import CacheObserver, LayerObservers, Named, empty, gather
from lmdeploy.lite.settings import CalibrationSettings
from lmdeploy.lite.stream import LayerStream
from lmdeploy.lite.windows import Tell, make_windows

INPUTS, OUTPUTS, KEYS, VALUES = "inputs_stats.pth", "outputs_stats.pth", "key_stats.pth", "value_stats.pth"
STATISTICS_FILES = (INPUTS, OUTPUTS, KEYS, VALUES)
_TOKENS_AT_A_TIME = 4096


@torch.inference_mode()
def calibrate(model: Path, settings: CalibrationSettings, tell: Tell) -> list[Path]:
    """Write the statistics into settings.work_dir; returns the files. Raises LMDeployError."""
    stream = LayerStream(model, torch.device(settings.device))
    folder = settings.work_dir
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--work-dir {folder} is no folder; choose another")
    with full_disk_is_an_error(folder):
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            windows = make_windows(model, settings, folder, tell)
            files = _observe_model(stream, windows.ids, settings.batch_size)
            written = [_write(folder / name, content) for name, content in files.items()]
        except BaseException:
            if not existed and not any(folder.iterdir()):
                folder.rmdir()
            raise
    if KEYS not in files:
        tell("no statistics of keys and values: this model caches latent vectors, not heads")
    tell(f"written to {folder}: {', '.join(files)}")
    return written


def read_statistics(file: Path) -> Named:
    """What `calibrate` has written. Raises CheckpointError for a file that is not there or holds something else."""
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} is not there; run `lmdeploy lite calibrate` with this --work-dir first"
        ) from error
    except Exception as error:  # torch raises many kinds for a broken file
        raise CheckpointError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
        raise CheckpointError(f"{file} holds no statistics by module; run `lmdeploy lite calibrate` again")
    return content


def _observe_model(stream: LayerStream, windows: Tensor, least: int) -> dict[str, Named]:
    """The content of each file by its name."""
    hidden = stream.embed(windows)
    step = max(least, _TOKENS_AT_A_TIME // windows.shape[1], 1)
    has_heads = stream.config.kv_shape[0] == 2
    files = {name: empty() for name in (INPUTS, OUTPUTS, *((KEYS, VALUES) if has_heads else ()))}
    with progress_bar("layers", stream.num_layers) as advance:
        for index in range(stream.num_layers):
            layer = stream.load_layer(index)
            observers, cached = LayerObservers(layer), (CacheObserver(), CacheObserver())
            for start in range(0, len(hidden), step):
                batch = hidden[start : start + step]
                context = stream.context(len(batch), windows.shape[1])
                hidden[start : start + step] = stream.run_layer(layer, batch, context)
                for observer, states in zip(cached, context.kv_cache.layer(index) if has_heads else (), strict=False):
                    observer.add(states)
            check_finite(hidden, index)
            origins = naming.layer_origins(stream, index)
            _gather_linears(files, origins, index, layer, observers)
            for name, observer in zip((KEYS, VALUES) if has_heads else (), cached, strict=False):
                gather(files[name], _layer_name(origins, index), observer.statistics())
            stream.drop_layer(index)
            advance()
    return files


def _gather_linears(
    files: dict[str, Named], origins: list[naming.Origin], index: int, layer: nn.Module, observers: LayerObservers
) -> None:
    """The statistics of every linear under its name in the checkpoint; a part of a fused linear has its own outputs."""
    for origin in origins:
        path, leaf = naming.path_of(origin, index)
        if leaf != "weight" or path not in observers.inputs:
            continue
        name = origin.name.removesuffix(".weight")
        if observers.inputs[path].count:
            gather(files[INPUTS], name, observers.inputs[path].statistics())
        is_row_wise = origin.is_reversible and len(origin.shape) == 2
        if observers.outputs[path].count and is_row_wise:
            rows = naming.model_rows(origin, layer.get_submodule(path))
            channels = rows % observers.outputs[path].statistics()["max"].numel()  # of experts: all have the same
            gather(files[OUTPUTS], name, observers.outputs[path].statistics(channels))


def _layer_name(origins: list[naming.Origin], index: int) -> str:
    """What the checkpoint calls the layer: model.layers.3."""
    match = re.match(rf".*?\.{index}(?=\.)", origins[0].name)
    return match[0] if match else f"layers.{index}"


def _write(file: Path, content: Named) -> Path:
    draft = file.with_suffix(".tmp")
    try:
        torch.save(content, draft)
        os.replace(draft, file)
    except RuntimeError as error:  # what torch raises when its zip writer cannot go on
        raise OSError(f"{file.name} cannot be written: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
    return file
