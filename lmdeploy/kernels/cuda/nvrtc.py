"""CUDA C++ to cubins at run time without nvcc, kept in the cache folder. It launches nothing and knows no kernel.

NVRTC comes with torch's CUDA wheels; kernels include nothing but common.cuh beside them, so no toolkit is needed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from lmdeploy import env

SOURCES = Path(__file__).parent
_COMMON = "common.cuh"  # what every kernel may include


class KernelError(Exception):
    """A kernel cannot be compiled, loaded or launched here; the message says why."""


def cubin(source: str, macros: Mapping[str, object], arch: str) -> bytes:
    """The compiled form of a file beside this one; thread-safe.

    arch: such as sm_90a. The cache's key covers the sources, macros, arch and NVRTC's version. Raises KernelError.
    """
    text = _source(source)
    options = [f"--gpu-architecture={arch}", "-std=c++17", "-default-device"]
    options += [f"-D{name}={value}" for name, value in sorted(macros.items())]
    key = hashlib.sha256("\0".join([text, _source(_COMMON), _version(), *options]).encode()).hexdigest()[:32]
    path = env.cache_dir() / "cuda" / f"{key}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        binary = _compile(text, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        partial.write_bytes(binary)
        partial.replace(path)
    except OSError:
        pass  # a cache that cannot be written costs time at every start and nothing else
    return binary


@functools.cache
def _source(name: str) -> str:
    return (SOURCES / name).read_text(encoding="utf-8")


@functools.cache
def _library() -> ctypes.CDLL:
    found = _find()
    try:
        # NVRTC opens its built-ins by name; loaded before, they are found wherever they lie.
        for builtins in Path(found).parent.glob("libnvrtc-builtins.so.*") if "/" in found else ():
            ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(found)
    except OSError as error:
        raise KernelError(f"NVRTC cannot be loaded: {error}") from None


@functools.cache
def _version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _find() -> str:
    """NVRTC of the wheels that torch brings, else the system's."""
    for folder in sys.path:
        for pattern in ("nvidia/cu*/lib/libnvrtc.so.*", "nvidia/cuda_nvrtc/lib/libnvrtc.so.*"):
            found = [path for path in sorted(Path(folder).glob(pattern)) if ".alt." not in path.name]
            if found:
                return str(found[-1])
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    found = [path for name in ("lib64", "lib") if (path := toolkit / name / "libnvrtc.so").exists()]
    return str(found[0]) if found else "libnvrtc.so"


def _compile(text: str, options: list[str]) -> bytes:
    library, program, size = _library(), ctypes.c_void_p(), ctypes.c_size_t()
    header, name = (ctypes.c_char_p(word.encode()) for word in (_source(_COMMON), _COMMON))
    if library.nvrtcCreateProgram(
        ctypes.byref(program), text.encode(), b"kernel.cu", 1, ctypes.byref(header), ctypes.byref(name)
    ):
        raise KernelError("NVRTC takes no program")
    try:
        arguments = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        if library.nvrtcCompileProgram(program, len(options), arguments):
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            raise KernelError(f"NVRTC {_version()} {' '.join(options)}: {log.value.decode(errors='replace')}")
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        binary = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, binary)
        return binary.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
