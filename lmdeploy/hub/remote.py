"""Models from Hugging Face and ModelScope: which of a repository's files are wanted. It leaves caching to the hubs' clients."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from lmdeploy import env
from lmdeploy.errors import ConfigError
from lmdeploy.hub import BUILTIN_NAME

_DESCRIPTION_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")
_SAFETENSORS, _TORCH_WEIGHTS = "*.safetensors", "pytorch_model*.bin"
# Other runtimes' copies of the same weights.
_IGNORED_FILES = ("original/*", "onnx/*", "openvino/*", "consolidated*")

Fetch = Callable[[Sequence[str]], Path]


def fetch_model(repo: str, file: str | None, revision: str | None, download_dir: str | None) -> Path:
    """The folder of repository `repo`, or its one file `file`, fetched unless it is there. Raises ConfigError."""
    hub, download = ("ModelScope", _modelscope) if env.use_modelscope() else ("Hugging Face", _hugging_face)
    target = os.path.expanduser(download_dir) if download_dir else None

    def fetch(patterns: Sequence[str]) -> Path:
        try:
            return Path(download(repo, revision, target, list(patterns)))
        except ConfigError:
            raise
        except Exception as error:  # the clients' network errors have no base class in common
            raise ConfigError(_hub_failure(hub, repo, error)) from error

    if file is None:
        return _fetch_folder(fetch, hub, repo)
    path = fetch([file]) / file
    if not path.is_file():
        raise ConfigError(f"{repo!r} on {hub} has no file {file!r}; look up its name on the model's page")
    return path


def _fetch_folder(fetch: Fetch, hub: str, repo: str) -> Path:
    folder = fetch([*_DESCRIPTION_FILES, _SAFETENSORS])
    if not any(folder.glob(_SAFETENSORS)):
        folder = fetch([*_DESCRIPTION_FILES, _TORCH_WEIGHTS])
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"{repo!r} on {hub} has no config.json; if it holds GGUF files, name one of them: {repo}:FILE.gguf"
        )
    return folder


def _hugging_face(repo: str, revision: str | None, cache_dir: str | None, patterns: list[str]) -> str:
    import huggingface_hub

    return huggingface_hub.snapshot_download(
        repo, revision=revision, cache_dir=cache_dir, allow_patterns=patterns, ignore_patterns=list(_IGNORED_FILES)
    )


def _modelscope(repo: str, revision: str | None, cache_dir: str | None, patterns: list[str]) -> str:
    try:
        import modelscope
    except ImportError as error:
        raise ConfigError(
            f"LMDEPLOY_USE_MODELSCOPE is set, but the package for it is missing ({error}); install it with "
            "`pip install modelscope`, or unset the variable to use Hugging Face"
        ) from error
    folder: str = modelscope.snapshot_download(
        repo, revision=revision, cache_dir=cache_dir, allow_patterns=patterns, ignore_patterns=list(_IGNORED_FILES)
    )
    return folder


def _hub_failure(hub: str, repo: str, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    reason = reason.removeprefix("Got: ").rstrip(".")
    token = " For a gated model accept its licence on the model's page and set HF_TOKEN." if "gated" in reason else ""
    return (
        f"model {repo!r} is no local path and could not be fetched from {hub}: {reason}.{token} "
        f"Without a network give a local folder or a .gguf file, or {BUILTIN_NAME!r}, the built-in model"
    )
