"""`lmdeploy serve proxy`: several servers behind one address. It loads no model and knows no endpoint."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from typing import TYPE_CHECKING

from lmdeploy import env
from lmdeploy.cli.chat import tell
from lmdeploy.cli.listening import (
    add_address_flags,
    add_api_keys_flag,
    add_drain_flag,
    add_log_level_flag,
    add_ssl_flag,
    address,
    positive,
    require,
    tls_files,
    uvicorn_level,
)
from lmdeploy.cli.parser import Parser
from lmdeploy.errors import ConfigError

if TYPE_CHECKING:
    from lmdeploy.serve.proxy.settings import ProxySettings

HELP = "several servers of several models behind one address"
DESCRIPTION = """Put several servers behind one address. A request goes to a server of the model that it names.

A server joins with `lmdeploy serve api_server MODEL --proxy-url http://HOST:8000`, or by POST /nodes/add. A request whose
server dies before the first byte of its answer goes to another one.
"""
DEFAULT_PORT = 8000
STRATEGIES = ("random", "min_expected_latency", "min_observed_latency", "cache_aware")
_EXTRA = ("fastapi", "prometheus_client", "uvicorn")
# Flags of the prefill and decode split, which does not exist here: their defaults, and the other values they have.
_SPLIT_FLAGS = {"--migration-protocol": ("RDMA", "NVLINK"), "--link-type": ("RoCE", "IB")}


def add_arguments(parser: Parser) -> None:
    parser.description = DESCRIPTION
    _add_server_flags(parser)
    _add_routing_flags(parser)
    _add_access_flags(parser)
    group = parser.add_argument_group("for command lines that were written for LMDeploy")
    group.add_argument(
        "--serving-strategy", choices=("Hybrid", "DistServe"), default="Hybrid",
        help="DistServe is not supported yet (default: Hybrid)",
    )  # fmt: skip
    for name, choices in _SPLIT_FLAGS.items():
        group.add_argument(
            name, choices=choices, default=choices[0], help=f"accepted; changes nothing (default: {choices[0]})"
        )
    for name in ("--dummy-prefill", "--disable-gdr"):
        group.add_argument(name, action="store_true", help="accepted; changes nothing")


def _add_server_flags(parser: Parser) -> None:
    group = parser.add_argument_group("server")
    add_address_flags(group, DEFAULT_PORT)
    group.add_argument(
        "--max-concurrent-requests", type=positive, default=4096, metavar="N",
        help="requests in work, beyond which a request gets 429 (default: 4096)",
    )  # fmt: skip
    add_drain_flag(group)
    add_log_level_flag(group)
    add_ssl_flag(group)


def _add_routing_flags(parser: Parser) -> None:
    group = parser.add_argument_group("routing")
    group.add_argument(
        "--routing-strategy", "--strategy", choices=STRATEGIES, type=lambda text: text.replace("-", "_"),
        default="min_expected_latency", metavar="NAME",
        help=f"{', '.join(STRATEGIES)} (default: min_expected_latency)",
    )  # fmt: skip
    group.add_argument(
        "--max-attempts", type=positive, default=3, metavar="N",
        help="servers that a request is tried on before the first byte of its answer (default: 3)",
    )  # fmt: skip
    group.add_argument(
        "--node-timeout", type=_seconds, metavar="S",
        help="silence of a server in the midst of a request, after which it fails (default: AIOHTTP_TIMEOUT, or none)",
    )  # fmt: skip
    group.add_argument(
        "--heartbeat-interval", type=_seconds, default=5.0, metavar="S",
        help="seconds between two GET /health to a server (default: 5)",
    )  # fmt: skip
    group.add_argument(
        "--heartbeat-expiration", type=_seconds, metavar="S",
        help="silence after which a server is forgotten (default: LMDEPLOY_CONTROLLER_HEART_BEAT_EXPIRATION, or 90)",
    )  # fmt: skip
    group.add_argument(
        "--balance-abs-threshold", type=positive, default=8, metavar="N",
        help="cache_aware: requests more than the least busy server has, below which a prefix stays (default: 8)",
    )  # fmt: skip
    group.add_argument(
        "--balance-rel-threshold", type=_ratio, default=1.5, metavar="X",
        help="cache_aware: multiple of the least busy server's requests, below which a prefix stays (default: 1.5)",
    )  # fmt: skip
    group.add_argument(
        "--disable-cache-status", action="store_true", help="do not keep the list of servers for the next start"
    )


def _add_access_flags(parser: Parser) -> None:
    group = parser.add_argument_group("access")
    add_api_keys_flag(group)
    group.add_argument("--admin-api-key", metavar="KEY", help="what /nodes/* asks for instead of one of --api-keys")
    group.add_argument(
        "--allow-origins", nargs="*", default=[], metavar="X", help="origins of browsers' requests (default: none)"
    )


def run(args: argparse.Namespace) -> int:
    require(_EXTRA, "the proxy", "serve")
    if args.serving_strategy != "Hybrid":
        raise ConfigError(f"--serving-strategy {args.serving_strategy} is not supported yet; leave it out")
    for name, choices in {**_SPLIT_FLAGS, "--dummy-prefill": (False,), "--disable-gdr": (False,)}.items():
        if getattr(args, name[2:].replace("-", "_")) != choices[0]:
            print(f"note: {name} has no effect in this proxy", file=sys.stderr)
    from lmdeploy.logging import get_logger
    from lmdeploy.serve.proxy.proxy import Proxy
    from lmdeploy.serve.proxy.server import ProxyServer
    from lmdeploy.serve.server import bind

    if args.log_level is not None:
        get_logger().setLevel(args.log_level)
    tls = tls_files(args)
    level = uvicorn_level(args.log_level)
    with closing(bind(args.server_name, args.server_port)) as sock:
        port = sock.getsockname()[1]
        proxy = Proxy(settings(args, port))
        server = ProxyServer(proxy, drain_timeout_s=args.drain_timeout, log_level=level, tls=tls)
        _greet(args, port)
        return server.run_on(sock)


def _greet(args: argparse.Namespace, port: int) -> None:
    if args.server_name not in ("127.0.0.1", "localhost", "::1") and not (args.api_keys or args.admin_api_key):
        tell("warning: whoever reaches this address can add and remove servers; give --admin-api-key or --api-keys")
    tell(f"proxy ({args.routing_strategy}) at {address(args, port)}; Ctrl-C ends it")


def settings(args: argparse.Namespace, port: int) -> ProxySettings:
    """What the flags and the environment say. port: the one listened on, which tells apart the proxies of a machine."""
    from lmdeploy.serve.proxy.settings import ProxySettings

    node_timeout_s, expiration_s = env.aiohttp_timeout_s(), env.heart_beat_expiration_s()
    return ProxySettings(
        strategy=args.routing_strategy,
        api_keys=tuple(args.api_keys),
        admin_api_key=args.admin_api_key,
        max_attempts=args.max_attempts,
        node_timeout_s=node_timeout_s if args.node_timeout is None else args.node_timeout,
        heartbeat_interval_s=args.heartbeat_interval,
        heartbeat_expiration_s=expiration_s if args.heartbeat_expiration is None else args.heartbeat_expiration,
        max_concurrent_requests=args.max_concurrent_requests,
        max_load_excess=args.balance_abs_threshold,
        max_load_ratio=args.balance_rel_threshold,
        allow_origins=tuple(args.allow_origins),
        state_path=None if args.disable_cache_status else env.cache_dir() / "proxy" / str(port) / "proxy_config.json",
    )


def _seconds(text: str) -> float:
    return _at_least(text, 0.001, "a number of seconds above 0")


def _ratio(text: str) -> float:
    return _at_least(text, 1.0, "a number of at least 1")


def _at_least(text: str, least: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r}: give {what}")
    return value
