"""The progress bar of a batch of prompts, on stderr. It knows no engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


def show_progress(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items as they come, with a bar that says how many of `count` have come."""
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=count)
        for item in items:
            bar.advance(task)
            yield item
