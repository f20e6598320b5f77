"""`lmdeploy lite kv_qparams` of LMDeploy 0.1: scales of an int8 KV cache, written beside a workspace's weights.

One file of float32 numbers for each layer and tensor-parallel rank, layers.{i}.past_kv_scale.{rank}.weight: asymmetric
[k_scale, k_zero, v_scale, v_zero] with scale = (max - min) / 255 and zero = (max + min) / 2, symmetric [k_scale, v_scale] with
scale = max |x| / 127. An engine of today quantizes the cache as it is written; to it the files say what `quant_policy = 4`
once meant.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.lite.calibrate import KEYS, VALUES, read_statistics
from lmdeploy.lite.export import full_disk_is_an_error
from lmdeploy.lite.observers import Named


@dataclass(frozen=True)
class KvSettings:
    """work_dir: of calibrate; turbomind_dir: the weights of a workspace; num_tp: GPUs that share the heads."""

    work_dir: Path
    turbomind_dir: Path
    kv_bits: int = 8
    kv_sym: bool = False
    num_tp: int = 1

    def __post_init__(self) -> None:
        if self.kv_bits != 8:
            raise ConfigError(
                f"--kv-bits {self.kv_bits}: these files are for 8 bits; 4 bits need none, use --quant-policy 4"
            )
        if self.num_tp < 1:
            raise ConfigError(f"--num-tp {self.num_tp}: at least 1")


def write_kv_scales(settings: KvSettings) -> list[Path]:
    """Write the files of all layers and ranks; returns them. Raises ConfigError or CheckpointError."""
    folder = settings.turbomind_dir
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is no folder; give the weights of a workspace, such as workspace/triton_models/weights"
        )
    keys, values = (read_statistics(settings.work_dir / name) for name in (KEYS, VALUES))
    written = []
    with full_disk_is_an_error(folder):
        for index, layer in enumerate(keys.get("absmax", {})):
            ranks = [_numbers(stats, layer, settings) for stats in (keys, values)]
            for rank, (key, value) in enumerate(zip(*ranks, strict=True)):
                file = folder / f"layers.{index}.past_kv_scale.{rank}.weight"
                draft = file.with_suffix(".tmp")
                draft.write_bytes(torch.tensor([*key, *value], dtype=torch.float32).numpy().tobytes())
                os.replace(draft, file)
                written.append(file)
    if not written:
        raise CheckpointError(f"{settings.work_dir / KEYS} names no layer; run `lmdeploy lite calibrate` again")
    return written


def _numbers(statistics: Named, layer: str, settings: KvSettings) -> list[list[float]]:
    """The numbers of keys or of values, rank by rank."""
    wanted = ("absmax",) if settings.kv_sym else ("max", "min")
    try:
        parts = [_by_rank(statistics[name][layer], settings.num_tp) for name in wanted]
    except KeyError as error:
        raise CheckpointError(
            f"{settings.work_dir}: the statistics lack {error} of {layer}; calibrate again"
        ) from error
    if settings.kv_sym:
        return [[part.max().item() / 127] for part in parts[0]]
    ends = [(high.max().item(), low.min().item()) for high, low in zip(*parts, strict=True)]
    return [[(high - low) / 255, (high + low) / 2] for high, low in ends]


def _by_rank(heads: Tensor, num_tp: int) -> tuple[Tensor, ...]:
    """[Hkv, D] cut by heads."""
    if len(heads) % num_tp:
        raise ConfigError(f"--num-tp {num_tp} does not divide the {len(heads)} heads of keys and values")
    return heads.chunk(num_tp)
