"""The index of a checkpoint in several files. It reads no weight."""

from __future__ import annotations

import json
from pathlib import Path

from lmdeploy.errors import CheckpointError
from lmdeploy.models.misfit import first_names


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names, in the order of their names. Raises CheckpointError if it is broken or one is missing."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of weight files: {error!r}; download it again") from error
    folder = index.parent
    outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise CheckpointError(f"{index} names files outside its folder: {', '.join(outside)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {len(names)} files, and {len(missing)} of them are missing: {first_names(missing)}; download them"
        )
    return [folder / name for name in names]
