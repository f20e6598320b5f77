"""Compiles the C++ kernels at first use, keeps the result in the cache folder, and loads it through ctypes.

It knows the flags, the cache and the functions' C signatures; not what they compute.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from lmdeploy import env
from lmdeploy.logging import get_logger

SOURCES = Path(__file__).parent
# -w: GCC warns of its own intrinsics; a user could do nothing about any warning.
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-w", "-fvisibility=hidden"]
_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
_TARGETS = {
    "native": ["-mcpu=native" if platform.machine().lower() in ("arm64", "aarch64") else "-march=native"],
    "avx2": ["-march=haswell"],
    "portable": ["-march=x86-64-v2"],
}

# Each takes one pointer to its packed arguments: ctypes converts sixteen of them in 1.5 us, struct in 0.25.
_FUNCTIONS = (
    "lm_attend",
    "lm_dense_linear",
    "lm_embed",
    "lm_gated_activation",
    "lm_gated_mlp",
    "lm_linear",
    "lm_pack",
    "lm_rms_norm",
)


class BuildError(Exception):
    """The kernels cannot be compiled or loaded here; the message says why."""


def _compiler() -> str:
    if os.name != "posix":
        raise BuildError("they are built on Linux and macOS only")
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return path
    raise BuildError("there is no C++ compiler (g++ or clang++) on the PATH")


def _cpu_flags() -> str:
    """What distinguishes this processor's instruction set from another machine that shares the cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split("\t")[0].strip(" :") in wanted}))


def _cache_key(compiler: str, flags: list[str]) -> str:
    """A hash of everything that the compiled file depends on."""
    real = Path(compiler).resolve()
    stat = real.stat()
    digest = hashlib.sha256("\n".join([str(real), f"{stat.st_size} {stat.st_mtime_ns}", _cpu_flags(), *flags]).encode())
    for source in sorted(p for p in SOURCES.iterdir() if p.suffix in (".h", ".cpp")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def _cache_folder() -> Path:
    """The kernels' cache folder, or a fresh private one where the cache cannot be written."""
    folder = env.cache_dir() / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lmdeploy-kernels-"))


def _run(commands: list[list[str]]) -> None:
    """Run the commands side by side; raise with the first failing one's message."""
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for command in commands]
    outputs = [process.communicate()[0] for process in running]
    for command, process, output in zip(commands, running, outputs, strict=True):
        if process.returncode:
            first = output.decode(errors="replace").strip().splitlines()[:3]
            raise BuildError(f"`{' '.join(command[:2])} ...` failed: {' | '.join(first)}")


def _compile(compiler: str, flags: list[str], target: Path) -> None:
    """Compile into a scratch folder and rename, so that another process sees all of the file or none of it."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        objects = {source: str(Path(scratch) / f"{source.stem}.o") for source in sorted(SOURCES.glob("*.cpp"))}
        _run([[compiler, *flags, "-c", str(source), "-o", out] for source, out in objects.items()])
        linked = Path(scratch) / "linked"
        _run([[compiler, "-shared", "-pthread", *objects.values(), "-o", str(linked)]])
        os.replace(linked, target)


def _open(path: Path) -> ctypes.CDLL:
    """Load the compiled file (CDLL: calls release the GIL) and declare its functions."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error
    for name in _FUNCTIONS:
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_char_p], None
    library.lm_instruction_set.restype = ctypes.c_char_p
    return library


@functools.cache
def load(target: str) -> ctypes.CDLL:
    """The kernels for "native", or for a smaller instruction set ("avx2", "portable"); raises BuildError."""
    compiler = _compiler()
    flags = [*_FLAGS, *_TARGETS[target]]
    try:
        path = _cache_folder() / f"cpu-{_cache_key(compiler, flags)}.so"
        if not path.exists():
            with FileLock(path.with_suffix(".lock")):  # a second process waits for the first one's result
                if not path.exists():
                    get_logger().info("compiling the CPU kernels into %s", path)
                    _compile(compiler, flags, path)
    except OSError as error:
        raise BuildError(str(error)) from error
    return _open(path)


_active: ctypes.CDLL | None = None
_failed = False


def is_available() -> bool:
    """Whether the kernels run here. The first call compiles them if need be; a failure warns once."""
    global _active, _failed
    if _active is not None:
        return True
    if _failed or env.disable_cpu_kernels():
        return False
    try:
        _active = load("native")
    except BuildError as error:
        _failed = True
        get_logger().warning("CPU kernels are off and PyTorch runs instead, several times slower: %s", error)
    return _active is not None


def library() -> ctypes.CDLL:
    """The loaded kernels. Call `is_available` first: this raises BuildError where they are not."""
    if _active is None and not is_available():
        raise BuildError("the CPU kernels are not available; `is_available()` tells before a call")
    assert _active is not None
    return _active


def use_target(target: str) -> AbstractContextManager[None]:
    """Run the kernels of another instruction set inside the block (tests and benchmarks)."""
    return use_library(load(target))


@contextmanager
def use_library(library: Any) -> Iterator[None]:
    """Call another library than `load` gave inside the block."""
    global _active
    before, _active = _active, library
    try:
        yield
    finally:
        _active = before
