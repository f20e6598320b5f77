"""Random cases of a benchmark's check, run at once and told one by one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

Outcomes = list["float | AssertionError"]


def run_checks(check: Callable[[int], float], count: int) -> Outcomes:
    """What the check of each number returns or raises: most of their time they compile."""

    def one(number: int) -> float | AssertionError:
        try:
            return check(number)
        except AssertionError as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, range(count)))


def error_of(outcome: float | AssertionError) -> float:
    """What a check has returned; raises what it has raised."""
    if isinstance(outcome, AssertionError):
        raise outcome
    return outcome
