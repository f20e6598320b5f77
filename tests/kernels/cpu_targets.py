"""Which instruction sets of the CPU kernels this machine can run, and a context that runs one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lmdeploy.kernels import cpu
from lmdeploy.kernels.cpu import build

TARGETS = ("native", "avx2", "portable")


@contextmanager
def running(target: str) -> Iterator[None]:
    """Run the block with the kernels of `target`; skip the test where they cannot be built or run."""
    if not cpu.is_available():
        pytest.skip("no CPU kernels on this machine")
    if target == "native":
        yield
        return
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if " avx2" not in flags or " fma" not in flags:
        pytest.skip(f"this machine does not run {target} code")
    with build.use_target(target):
        yield
