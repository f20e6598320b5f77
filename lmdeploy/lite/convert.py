"""Writes a workspace: a model's tensors in safetensors beside config.ini, and its tokenizer. It computes no weight anew.

The layout is that of LMDeploy 0.1; the tensors are those of the checkpoint, under their own names.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.lite.export import ShardWriter, copy_companions, storable, write_json
from lmdeploy.lite.stream import LayerStream
from lmdeploy.models.checkpoint import Checkpoint, open_checkpoint, weight_files
from lmdeploy.models.config import ModelConfig, find_architecture, load_config, read_hf_config
from lmdeploy.models.torch_file import TorchFile
from lmdeploy.models.weights import dense
from lmdeploy.tokenizer import Tokenizer
from lmdeploy.workspace import CONFIG, TOKENIZER, WEIGHTS, write_config_ini
from lmdeploy.workspace_settings import check_template_name, config_ini_values

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "*.tiktoken")


@dataclass(frozen=True)
class ConvertSettings:
    """What a conversion is asked for.

    model_name: the chat template, by name. model_format, group_size: what the user believes of the weights; None and 0 ask
    for nothing. tokenizer_path: a folder or a file to take the tokenizer from. dtype: what the engine is to compute in.
    """

    model_name: str
    dst_path: Path
    model_format: str | None = None
    group_size: int = 0
    tokenizer_path: Path | None = None
    dtype: str = "auto"


def convert(source: Path, settings: ConvertSettings, tell: Callable[[str], None]) -> Path:
    """Write the workspace of a model folder or GGUF file, and return its path.

    It appears whole under its name or not at all. Raises ConfigError, CheckpointError or ModelNotSupported.
    """
    output = Path(os.path.abspath(settings.dst_path.expanduser()))
    check_template_name(settings.model_name)
    _check_output(output)
    config = _check_source(source, settings, tell)
    draft = output.with_name(output.name + ".partial")
    try:
        shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
        for folder in (WEIGHTS, TOKENIZER):
            (draft / folder).mkdir(parents=True)
        _write_weights(source, draft / WEIGHTS, config, settings, tell)
        _write_tokenizer(source, draft / TOKENIZER, settings.tokenizer_path)
        _complete(source, draft, settings)
        if output.exists():
            output.rmdir()  # an empty folder, which only some systems replace
        os.replace(draft, output)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--dst-path: {output} cannot be written ({reason}); make room, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return output


def _check_output(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"--dst-path: {output} exists already; remove it, or choose another folder")


def _check_source(source: Path, settings: ConvertSettings, tell: Callable[[str], None]) -> ModelConfig:
    """Read all headers and the tokenizer, so that what cannot be run later stops here."""
    if (source / CONFIG).exists():
        raise ConfigError(f"{source} belongs to a workspace already; edit its {CONFIG}, or convert the original model")
    if source.is_dir() and not (source / "config.json").exists() and any(source.glob("consolidated*.pth")):
        raise ConfigError(
            f"{source} holds Meta's original files, which are not read; give the model's Hugging Face folder"
        )
    config = LayerStream(source, torch.device("cpu")).config
    if settings.model_format is not None:
        open_checkpoint(
            source, config.quantization, settings.model_format
        )  # a notice, if the files hold another format
    group_size = (config.quantization or {}).get("group_size")
    if settings.group_size > 0 and settings.group_size != group_size:
        found = f"groups of {group_size}" if group_size else "no groups"
        tell(f"--group-size {settings.group_size}: the weights have {found}; they are converted as what they are")
    if settings.tokenizer_path is None:
        Tokenizer(source)
    elif not settings.tokenizer_path.exists():
        raise ConfigError(f"--tokenizer-path: {settings.tokenizer_path} does not exist")
    return config


def _write_weights(
    source: Path, folder: Path, config: ModelConfig, settings: ConvertSettings, tell: Callable[[str], None]
) -> None:
    """The tensors, and config.json."""
    if source.is_file():
        _write_dequantized(source, folder, settings.dtype, tell)
        return
    shutil.copyfile(source / "config.json", folder / "config.json")
    files = weight_files(source)
    if files[0].suffix == ".safetensors":
        for file in files:
            _link_or_copy(file, folder / file.name)
        _write_index(source, folder, [file.name for file in files])
        return
    tell(f"writing the tensors of {len(files)} .bin files as safetensors")
    tensors = Checkpoint(TorchFile(file) for file in files)
    writer = ShardWriter(folder)
    for name in tensors.infos:
        writer.add(
            name, dense(tensors.read(name)).clone()
        )  # tied weights share memory there, which safetensors refuses
    writer.finish()


def _write_dequantized(source: Path, folder: Path, dtype_name: str, tell: Callable[[str], None]) -> None:
    """A GGUF file's tensors in 16 bits under their Hugging Face names: safetensors has no such blocks."""
    dtype = _DTYPES.get(dtype_name, torch.float16)
    tell(f"writing the GGUF file's tensors in {str(dtype).removeprefix('torch.')}; the file itself is smaller")
    stream, writer = LayerStream(source, torch.device("cpu")), ShardWriter(folder)
    for name in stream.source.infos:
        writer.add(name, storable(name, dense(stream.source.read(name)), dtype))
    writer.finish()
    hf = {key: value for key, value in read_hf_config(source).items() if value is not None}
    architecture = {"architectures": [find_architecture(hf)]}
    write_json(folder / "config.json", {**architecture, **hf, "torch_dtype": str(dtype).removeprefix("torch.")})


def _link_or_copy(file: Path, target: Path) -> None:
    """A second name for the file, which takes no space; a copy where the file system gives none."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)


def _write_index(source: Path, folder: Path, names: list[str]) -> None:
    """The shards' index, without tensors of files that are not there."""
    index = source / "model.safetensors.index.json"
    if not index.is_file():
        return
    content = json.loads(index.read_text(encoding="utf-8"))
    kept = {tensor: name for tensor, name in content["weight_map"].items() if name in names}
    write_json(folder / index.name, {**content, "weight_map": kept})


def _write_tokenizer(source: Path, folder: Path, tokenizer_path: Path | None) -> None:
    """The model's tokenizer files, or those of tokenizer_path in place of them."""
    if source.is_dir() or tokenizer_path is None:
        copy_companions(source, folder)
    if tokenizer_path is None:
        return
    for pattern in _VOCABULARIES:
        for file in folder.glob(pattern):
            file.unlink()
    if tokenizer_path.is_file() and tokenizer_path.suffix != ".gguf":
        shutil.copyfile(tokenizer_path, folder / tokenizer_path.name)
    else:
        copy_companions(tokenizer_path, folder)


def _complete(source: Path, draft: Path, settings: ConvertSettings) -> None:
    """The config files that both folders need, config.ini, and a look at the tokenizer that will be used."""
    weights, tokenizer = draft / WEIGHTS, draft / TOKENIZER
    shutil.copyfile(weights / "config.json", tokenizer / "config.json")
    generation = source / "generation_config.json" if source.is_dir() else tokenizer / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, weights / generation.name)
    if settings.tokenizer_path is not None:
        try:
            Tokenizer(tokenizer)
        except CheckpointError as error:
            raise ConfigError(f"--tokenizer-path {settings.tokenizer_path}: {error}") from error
    values = config_ini_values(settings.model_name, load_config(weights), settings.dtype)
    write_config_ini(weights, values)
