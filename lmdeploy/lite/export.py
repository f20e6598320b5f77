"""Writes a finished run as a Hugging Face folder: weights in shards, config, tokenizer. It computes no weight.

A GGUF file has no config.json and no tokenizer files; those are written from its metadata.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.models.config import read_hf_config
from lmdeploy.workspace import tokenizer_folder

_SHARD_BYTES = 2 << 30
_FILE_MODE = 0o644
_COPIED = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "LICENSE*")
_NOT_COPIED = ("*.index.json", "config.json", "quality.json", "calibration.txt")
_INDEX = "model.safetensors.index.json"
_SHARDS = "model-*-of-*.safetensors"


class ShardWriter:
    """Collects tensors and writes them in files of at most 2 GiB, unless one tensor is larger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.total_bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; earlier ones may be written now."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > _SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def finish(self) -> None:
        """Write the rest, give the files their final names, and an index if there are several."""
        self._flush()
        count = len(self._shards)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if count == 1:
            names = ["model.safetensors"]
        for number, name in enumerate(names):
            self._draft(number).chmod(_FILE_MODE)  # safetensors leaves it to its owner alone
            os.replace(self._draft(number), self.folder / name)
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            write_json(self.folder / _INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map})

    def _draft(self, number: int) -> Path:
        return self.folder / f"shard-{number:05}.safetensors"

    def _flush(self) -> None:
        save_file(self._pending, self._draft(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def storable(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """An unquantized tensor as it is written. Raises CheckpointError for damaged values, ConfigError for too large ones."""
    rounded = value.to(dtype) if value.is_floating_point() else value
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise CheckpointError(f"tensor {name} holds NaN or infinity; the weights are damaged: download them again")
    if rounded.is_floating_point() and not torch.isfinite(rounded).all():
        raise ConfigError(f"tensor {name} has values that {dtype} cannot hold; use --dtype bfloat16")
    return rounded


def write_config(source: Path, folder: Path, quantization: Mapping[str, Any], dtype: torch.dtype) -> None:
    """config.json of the source, or of a GGUF file's metadata, with the quantization."""
    if source.is_file():
        from lmdeploy.models.config import find_architecture

        hf = {key: value for key, value in read_hf_config(source).items() if value is not None}
        hf = {"architectures": [find_architecture(hf)], **hf}
    else:
        hf = json.loads((source / "config.json").read_text(encoding="utf-8"))
    hf.pop("dtype", None)
    hf["torch_dtype"] = str(dtype).removeprefix("torch.")
    hf["quantization_config"] = dict(quantization)
    write_json(folder / "config.json", hf)


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, template and generation files; of a GGUF file what its metadata holds of them."""
    if source.is_file():
        write_gguf_tokenizer(source, folder)
        return
    if (source / "config.ini").exists():
        source = tokenizer_folder(source)
    left_out = {path for pattern in _NOT_COPIED for path in source.glob(pattern)}
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.is_file() and path not in left_out:
                shutil.copyfile(path, folder / path.name)


def write_gguf_tokenizer(source: Path, folder: Path) -> None:
    """tokenizer.json or tokenizer.model, and tokenizer_config.json with the named tokens and the chat template."""
    from lmdeploy.gguf_file import read_metadata
    from lmdeploy.tokenizer import Tokenizer
    from lmdeploy.tokenizer.gguf_vocabulary import build_gguf_vocabulary, read_gguf_settings

    tokenizer = Tokenizer(source)
    metadata = read_metadata(source)
    settings = read_gguf_settings(metadata)
    build_gguf_vocabulary(source, metadata).save(folder)
    flags = dict.fromkeys(("normalized", "lstrip", "rstrip", "single_word"), False)
    added = {str(i): {"content": text, "special": True, **flags} for text, i in tokenizer.special_tokens.items()}
    named = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast" if (folder / "tokenizer.json").exists() else "LlamaTokenizer",
        "added_tokens_decoder": added,
        **{name: text for name, text in named.items() if text is not None},
        "add_bos_token": bool(settings.add_bos),
        "add_eos_token": bool(settings.add_eos),
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.chat_template,
    }
    write_json(folder / "tokenizer_config.json", {key: value for key, value in content.items() if value is not None})
    ends: Sequence[int] = tokenizer.eos_token_ids
    write_json(folder / "generation_config.json", {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": list(ends)})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def publish(draft: Path, output: Path) -> None:
    """Give the finished folder its final name; into a folder that exists, file by file, config.json last.

    Weight files that an earlier model has left there go, since its index would lead to them.
    """
    if not output.exists():
        os.replace(draft, output)
        return
    new = {path.name for path in draft.iterdir()}
    for path in [output / _INDEX, *output.glob(_SHARDS), output / "model.safetensors"]:
        if path.name not in new:
            path.unlink(missing_ok=True)
    for path in sorted(draft.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output / path.name)
    draft.rmdir()


@contextmanager
def full_disk_is_an_error(folder: Path) -> Iterator[None]:
    """What the system refuses to write becomes one ConfigError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"{folder} cannot be written ({reason}); free some space or choose another --work-dir, and start the "
            "command again"
        ) from error
