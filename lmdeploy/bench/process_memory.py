"""How much memory processes hold, and have held at most. It knows nothing of what is in it."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """Peak resident set size. On Linux that of this program alone; getrusage would count the parent's before exec."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes(process: int | str = "self") -> int:
    """Resident set size of a process, by its id; Linux alone tells it."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
