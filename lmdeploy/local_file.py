"""What all readers of a model's files share: JSON objects, and what git-lfs leaves instead of a file. It knows no content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmdeploy.errors import CheckpointError

_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, empty if there is no such file. Raises CheckpointError for anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError is one
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not {type(value).__name__}")
    return value


def refuse_pointer(file: Path) -> None:
    """Raise CheckpointError if the file is what git leaves where git-lfs has not fetched the content."""
    with open(file, "rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{file} is a git-lfs pointer, not the file itself; run `git lfs install && git lfs pull` in {file.parent}"
            )
