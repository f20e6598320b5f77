"""`lmdeploy check_env`: what a bug report needs to know of this machine and installation. It runs no model."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmdeploy import env
from lmdeploy.cli.parser import Parser
from lmdeploy.errors import ConfigError
from lmdeploy.version import __version__

HELP = "show versions, hardware, and which kernels run here"
Report = dict[str, dict[str, str]]

_PACKAGES = ("torch", "triton", "safetensors", "tokenizers", "sentencepiece", "tiktoken", "gguf", "numpy")
_CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TM_LOG_LEVEL", "TRITON_INTERPRET")
_GIB = 1 << 30


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--dump-file", type=Path, metavar="FILE", help="write the report there too: .json, .yml, .yaml or .txt"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    check_dump_file(args.dump_file)
    report = collect()
    print(json.dumps(report) if args.json else as_text(report))
    if args.dump_file is not None:
        dump(report, args.dump_file)
    return 0


def collect() -> Report:
    """Everything, as section -> name -> value."""
    return {
        "lmdeploy": {"version": __version__, "cache": str(env.cache_dir()), **_environment()},
        "python": {"version": sys.version.split()[0], "executable": sys.executable, "platform": platform.platform()},
        "packages": _packages(),
        "torch": _torch(),
        "cpu": _cpu(),
        "gpu": _gpus(),
        "kernels": _kernels(),
    }


def as_text(report: Report) -> str:
    """Sections with indented rows."""
    lines = []
    for section, rows in report.items():
        width = max(map(len, rows), default=0)
        lines.append(f"{section}:")
        lines += [f"  {name + ':':<{width + 1}} {value}" for name, value in rows.items()]
    return "\n".join(lines)


def check_dump_file(path: Path | None) -> None:
    """Raise ConfigError for a file type that is not written here, before anything is measured."""
    if path is None or path.suffix in _WRITERS:
        return
    if path.suffix in (".pkl", ".pickle"):
        raise ConfigError(
            f"--dump-file {path}: pickle files are not written, since loading one can run any code; use .json or .yml"
        )
    raise ConfigError(f"--dump-file {path}: unknown file type {path.suffix!r}; use {', '.join(_WRITERS)}")


def dump(report: Report, path: Path) -> None:
    """Write the report in the format that the file's name asks for. Raises ConfigError where that cannot be written."""
    try:
        path.write_text(_WRITERS[path.suffix](report) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--dump-file {path} cannot be written: {error.strerror or error}") from error


def as_yaml(report: Report) -> str:
    """Two levels of mappings; every value is a double-quoted string, which YAML reads as JSON does."""
    lines = []
    for section, rows in report.items():
        lines.append(f"{section}:" if rows else f"{section}: {{}}")
        lines += [f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in rows.items()]
    return "\n".join(lines)


_WRITERS = {
    ".json": lambda report: json.dumps(report, indent=2, ensure_ascii=False),
    ".yml": as_yaml,
    ".yaml": as_yaml,
    ".txt": as_text,
}


# ---- sections ----


def _environment() -> dict[str, str]:
    names = sorted(name for name in os.environ if name.startswith("LMDEPLOY_") or name in _VARIABLES)
    return {name: os.environ[name] for name in names}


def _packages() -> dict[str, str]:
    """Versions of what lmdeploy requires, or of the main ones where it runs without being installed."""
    from importlib import metadata

    try:
        required = metadata.requires("lmdeploy") or []
    except metadata.PackageNotFoundError:
        required = []
    base = [re.split(r"[^\w.-]", line)[0] for line in required if "extra ==" not in line]
    versions = {}
    for name in sorted({*base, *_PACKAGES}, key=str.lower):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _torch() -> dict[str, str]:
    import torch

    return {
        "version": torch.__version__,
        "CUDA of the build": torch.version.cuda or "none, a CPU build",
        "sees CUDA": str(torch.cuda.is_available()),
        "threads": str(torch.get_num_threads()),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu() -> dict[str, str]:
    info = _cpu_info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    affinity = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity else os.cpu_count()
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "cores": f"{usable} usable of {os.cpu_count()}",
        "flags": " ".join(flag for flag in _CPU_FLAGS if flag in flags) or "unknown",
        "memory": _memory(),
        "compiler": _compiler(),
    }


def _cpu_info() -> Mapping[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        block = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory() -> str:
    import torch

    from lmdeploy.engine.memory import device_memory

    total, free = device_memory(torch.device("cpu"))
    return f"{total / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free"


def _compiler() -> str:
    for name in ("g++", "clang++", "c++", "cl"):
        if path := shutil.which(name):
            try:
                answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
            except (OSError, subprocess.TimeoutExpired):
                continue
            return (answer.stdout or answer.stderr).strip().split("\n")[0] or path
    return "none"


def _gpus() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {"GPUs": "none that torch sees"}
    rows: dict[str, str] = {}
    for index in range(torch.cuda.device_count()):
        properties: Any = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        rows[f"GPU {index}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs, "
            f"{total / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free"
        )
    return rows


def _kernels() -> dict[str, str]:
    from lmdeploy.kernels import cpu

    if env.disable_cpu_kernels():
        on_cpu = "PyTorch (LMDEPLOY_DISABLE_CPU_KERNELS is set)"
    elif cpu.is_available():
        on_cpu = f"compiled for {cpu.instruction_set()}"
    else:
        on_cpu = "PyTorch (the compiled kernels cannot be built here; see the warning above)"
    return {"on the CPU": on_cpu, **_gpu_kernels()}


def _gpu_kernels() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    from lmdeploy.kernels import has_gpu_kernels
    from lmdeploy.kernels.cuda.skinny_gemm import arch, is_available

    if not has_gpu_kernels():
        return {"on the GPU": "PyTorch (Triton and a GPU of compute capability 8.0 or newer are needed)"}
    cuda = f"CUDA C++ for {arch()}" if is_available() else "no CUDA C++ (NVRTC cannot compile; see the warning above)"
    return {"on the GPU": f"Triton, {cuda}"}
