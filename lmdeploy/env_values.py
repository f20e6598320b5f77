"""Sizes and times as environment variables give them. It reads no variable."""

from __future__ import annotations

import string

from lmdeploy.errors import ConfigError

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "mb": 10**6, "gb": 10**9}


def size_bytes(name: str, text: str) -> int:
    """Bytes of a text such as `40960MiB`. Raises ConfigError."""
    digits = text.rstrip(string.ascii_letters + " ")
    try:
        size = int(float(digits) * _UNITS[text[len(digits) :].strip().lower()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{name}={text!r} is not a size; write for example 40960MiB")
    return size


def seconds(name: str, text: str) -> float:
    """A number of seconds above 0. Raises ConfigError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise ConfigError(f"{name}={text!r}: give a number of seconds above 0")
    return value
