"""What to tell a user whose checkpoint is incomplete or does not fit the model. It judges nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmdeploy.models.filling import Slot

_NAMES_SHOWN = 8


def describe_misfit(slots: dict[str, Slot], unused: list[str]) -> str:
    """The parameters without a tensor, the tensors without a parameter, and what to do."""
    missing = list(_unfilled(slots))
    hint = '; if the embedding is the head, set "tie_word_embeddings": true' if missing == ["lm_head.weight"] else ""
    return (
        f"the checkpoint does not fit the model: {_listed(missing, 'parameters without a tensor')}; "
        f"{_listed(unused, 'tensors without a parameter')}; complete the download, or mend config.json{hint}"
    )


def _unfilled(slots: dict[str, Slot]) -> Iterator[str]:
    for name, slot in slots.items():
        gaps = [part for part in range(len(slot.parts)) if part not in slot.sources]
        if len(gaps) == len(slot.parts):
            yield name
        elif gaps:
            yield f"{name} (parts {', '.join(map(str, gaps))} of {len(slot.parts)})"


def _listed(names: list[str], what: str) -> str:
    return f"{len(names)} {what}" + (f" ({first_names(names)})" if names else "")


def list_folder(folder: Path) -> str:
    """What is in a folder, for a message."""
    names = sorted(entry.name for entry in folder.iterdir())
    return first_names(names) if names else "nothing"


def first_names(names: Sequence[str], limit: int = _NAMES_SHOWN) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
