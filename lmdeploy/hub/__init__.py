"""From a model's name to a local folder or GGUF file: local paths here, hubs and the built-in model in modules of their own.

It does not know what the files hold.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lmdeploy.errors import ConfigError

BUILTIN_NAME = "smollm2-135m-instruct"
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*(?:/\w[\w.-]*)?)(?:[:/](?P<file>[^:*?\[\]]+\.gguf))?", re.IGNORECASE)


def resolve(model: str | None, *, revision: str | None = None, download_dir: str | None = None) -> Path:
    """Return the local folder or .gguf file that `model` names, fetched first if need be.

    model: a folder, a .gguf file, a hub id `owner/name`, one file of a hub `owner/name:FILE.gguf` (or with a slash), or
    None for the built-in model. Of a workspace it is the folder of weights. What exists locally wins. download_dir: where
    hubs and the built-in model keep files, instead of their own caches. Raises ConfigError, or CheckpointError for a
    download whose checksum is wrong, and for a workspace of LMDeploy 0.x.
    """
    if model is None:
        return _builtin(download_dir)
    if not model.strip():
        raise ConfigError("the model name is empty; give a folder, a .gguf file or a hub id, or leave it out")
    path = Path(os.path.expanduser(model))
    if path.exists():
        return _local(path)
    if model.casefold() == BUILTIN_NAME:
        return _builtin(download_dir)
    match = _HUB_ID.fullmatch(model)
    if match is None or match["repo"].lower().endswith(".gguf"):
        raise ConfigError(
            f"model {model!r} does not exist: no such folder or file here, and no hub id either; those read "
            "owner/name, or owner/name:FILE.gguf for one GGUF file"
        )
    from lmdeploy.hub.remote import fetch_model

    return fetch_model(match["repo"], match["file"], revision, download_dir)


def is_builtin(model: str | None) -> bool:
    """Whether `resolve` takes this for the built-in model."""
    return model is None or (model.casefold() == BUILTIN_NAME and not os.path.exists(model))


def _builtin(download_dir: str | None) -> Path:
    from lmdeploy.hub.builtin import builtin_model

    return builtin_model(download_dir)


def _local(path: Path) -> Path:
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise ConfigError(f"model {str(path)!r} is a file but not a .gguf file; give the folder that holds config.json")
    if (path / "config.json").exists():
        return path
    if any((path / where / "config.ini").exists() for where in ("triton_models/weights", "weights", "")):
        from lmdeploy.workspace import weights_folder

        return weights_folder(path)
    found = sorted(p for p in path.iterdir() if p.suffix.lower() == ".gguf")
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ConfigError(f"model folder {str(path)!r} holds several GGUF files; give the path of one of: {names}")
    return found[0] if found else path
