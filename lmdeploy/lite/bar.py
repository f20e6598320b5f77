"""The progress of a long command, with the time left, on stderr: a bar, or lines in a log. It knows no command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def progress_bar(title: str, count: int) -> Iterator[Callable[[], None]]:
    """The value advances the bar by one of `count` steps."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(title, count).advance
        return
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=count)
        yield lambda: bar.advance(task)


class _Lines:
    """Progress for a log, which keeps whatever is written: the last step, and others not too often."""

    def __init__(self, title: str, count: int) -> None:
        self._title = title
        self._count = count
        self._done = 0
        self._start = self._told = monotonic()

    def advance(self) -> None:
        self._done += 1
        now = monotonic()
        if now - self._told < _SECONDS_BETWEEN_LINES and self._done < self._count:
            return
        self._told = now
        taken = now - self._start
        left = taken / self._done * (self._count - self._done)
        times = [str(timedelta(seconds=round(seconds))) for seconds in (taken, left)]
        print(f"{self._title} {self._done}/{self._count} in {times[0]}, {times[1]} left", file=sys.stderr, flush=True)
