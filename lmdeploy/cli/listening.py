"""What the commands that listen on a port share: flags, and what is made of them. It knows no server."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmdeploy.errors import ConfigError

if TYPE_CHECKING:
    from lmdeploy.serve.server import Tls

_LOG_LEVELS = ("CRITICAL", "FATAL", "ERROR", "WARN", "WARNING", "INFO", "DEBUG", "NOTSET")
_UVICORN_LEVELS = {"WARN": "warning", "FATAL": "critical", "NOTSET": "debug"}
Group = argparse._ArgumentGroup


def add_address_flags(group: Group, default_port: int) -> None:
    group.add_argument(
        "--server-name",
        default="127.0.0.1",
        metavar="HOST",
        help="address to listen on; 0.0.0.0: all (default: 127.0.0.1)",
    )
    group.add_argument(
        "--server-port", type=int, default=default_port, metavar="PORT", help=f"0: a free one (default: {default_port})"
    )


def add_drain_flag(group: Group) -> None:
    group.add_argument(
        "--drain-timeout", type=float, default=60.0, metavar="S",
        help="seconds that running answers get after a signal (default: 60)",
    )  # fmt: skip


def add_log_level_flag(group: Group) -> None:
    group.add_argument("--log-level", choices=_LOG_LEVELS, type=str.upper, help="(default: WARNING)")


def add_ssl_flag(group: Group) -> None:
    group.add_argument(
        "--ssl", action="store_true", help="HTTPS, with the files that SSL_KEYFILE and SSL_CERTFILE name"
    )


def add_api_keys_flag(group: Group) -> None:
    group.add_argument(
        "--api-keys",
        nargs="+",
        default=[],
        metavar="KEY",
        help="keys of which a request has to bear one; all paths but /health",
    )


def positive(text: str) -> int:
    """The value of a flag that counts something."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return int(text)


def require(modules: Sequence[str], what: str, extra: str) -> None:
    """Raise ConfigError, with the command that installs them, if modules that `what` needs are missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} missing; {what} needs the extra `{extra}`: pip install 'lmdeploy[{extra}]'"
        )


def uvicorn_level(level: str | None) -> str:
    """uvicorn's name of what --log-level says."""
    return _UVICORN_LEVELS.get(level or "", level or "warning").lower()


def address(args: argparse.Namespace, port: int) -> str:
    """The address to tell, with the port that is really listened on."""
    host = f"[{args.server_name}]" if ":" in args.server_name else args.server_name
    return f"{'https' if args.ssl else 'http'}://{host}:{port}"


def tls_files(args: argparse.Namespace) -> Tls | None:
    """What --ssl and the environment name; None without --ssl. Raises ConfigError where a file is missing."""
    from lmdeploy import env
    from lmdeploy.serve.server import Tls

    if not args.ssl:
        return None
    key_file, cert_file = env.tls_files()
    for name, path in (("SSL_KEYFILE", key_file), ("SSL_CERTFILE", cert_file)):
        if path is None or not Path(path).is_file():
            raise ConfigError(f"--ssl needs the environment variable {name} to name a file; it is {path!r}")
    return Tls(str(key_file), str(cert_file))
