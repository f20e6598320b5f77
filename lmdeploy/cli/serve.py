"""`lmdeploy serve`: an OpenAI-compatible server of one model. It knows no endpoint."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy.cli import serve_client, serve_gradio, serve_proxy
from lmdeploy.cli.chat import add_speculative_flags, add_template_flags, refuse_speculative, tell, template_config
from lmdeploy.cli.flags import add_engine_flags, add_model_argument, engine_settings, warn_remote_code
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
    from socket import socket

    from lmdeploy.async_engine import AsyncEngine
    from lmdeploy.serve.registration import Registration
    from lmdeploy.serve.settings import ServerSettings

HELP = "serve a model over HTTP"
DESCRIPTION = """Serve a model with the interface of OpenAI, and LMDeploy's own endpoints.

The pages at `/` document every endpoint, the one at `/chat` talks with the model. The first Ctrl-C or SIGTERM takes no new
requests and ends when the running ones have; the second ends at once.
"""
ENGINE_DEFAULTS: dict[str, Any] = {"enable_prefix_caching": True}
DEFAULT_PORT = 23333
OTHER_KINDS = {"api_client": serve_client, "gradio": serve_gradio, "proxy": serve_proxy}
_EXTRA = ("fastapi", "fastapi_offline", "prometheus_client", "uvicorn")


@dataclass(frozen=True)
class LaterFlag:
    """A flag of LMDeploy that parses; a value other than the default is refused unless it could change no answer."""

    name: str
    default: Any = None
    kind: type = str
    is_harmless: bool = False

    @property
    def dest(self) -> str:
        return self.name[2:].replace("-", "_")

    @property
    def help(self) -> str:
        known = "" if self.default in (None, False) else f" (default: {self.default})"
        return ("accepted; changes nothing" if self.is_harmless else "not supported yet") + known


LATER_FLAGS = (
    LaterFlag("--dp", 1, int),
    LaterFlag("--ep", 1, int),
    LaterFlag("--nnodes", 1, int),
    LaterFlag("--node-rank", 0, int),
    LaterFlag("--dist-init-addr"),
    LaterFlag("--role", "Hybrid"),
    LaterFlag("--distributed-executor-backend"),
    LaterFlag("--enable-return-routed-experts", False, bool),
    LaterFlag("--logprobs-mode", "raw_logprobs"),
    LaterFlag("--dllm-unmasking-strategy", "low_confidence_dynamic"),
    LaterFlag("--dllm-denoising-steps", None, int),
    LaterFlag("--dllm-confidence-threshold", 0.85, float),
    LaterFlag("--enable-microbatch", False, bool, is_harmless=True),
    LaterFlag("--enable-eplb", False, bool, is_harmless=True),
    LaterFlag("--migration-backend", "DLSlime", is_harmless=True),
    LaterFlag("--kernel-block-size", -1, int, is_harmless=True),
    LaterFlag("--num-tokens-per-iter", 0, int, is_harmless=True),
    LaterFlag("--max-prefill-iters", 1, int, is_harmless=True),
    LaterFlag("--vision-max-batch-size", 1, int, is_harmless=True),
)


def add_arguments(parser: Parser) -> None:
    parser.description = DESCRIPTION
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    server = kinds.add_parser("api_server", help="a server with the interface of OpenAI", description=DESCRIPTION)
    add_model_argument(server)
    _add_server_flags(server)
    _add_model_flags(server)
    _add_access_flags(server)
    add_engine_flags(server, ENGINE_DEFAULTS)
    add_speculative_flags(server)
    _add_later_flags(server)
    for name, module in OTHER_KINDS.items():
        module.add_arguments(kinds.add_parser(name, help=module.HELP))


def _add_server_flags(parser: Parser) -> None:
    group = parser.add_argument_group("server")
    add_address_flags(group, DEFAULT_PORT)
    group.add_argument(
        "--max-concurrent-requests", type=positive, metavar="N",
        help="answers in work or waiting, beyond which a request gets 429 (default: 8 times max-batch-size)",
    )  # fmt: skip
    group.add_argument(
        "--max-queued-tokens", type=positive, metavar="N",
        help="the same bound for the tokens of their prompts (default: 4 times what the KV cache holds)",
    )  # fmt: skip
    add_drain_flag(group)
    group.add_argument(
        "--proxy-url",
        metavar="URL",
        help="a `lmdeploy serve proxy` to join; LMDEPLOY_API_KEY, or the first of --api-keys, is shown",
    )
    add_log_level_flag(group)
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text",
        help="json: one object a line, and one line a request (default: text)",
    )  # fmt: skip
    group.add_argument("--max-log-len", type=int, metavar="N", help="characters of a prompt that the log shows")
    group.add_argument("--disable-fastapi-docs", action="store_true", help="no pages at `/` and `/chat`")
    group.add_argument("--disable-metrics", action="store_true", help="no /metrics")
    add_ssl_flag(group)


def _add_model_flags(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model-name", metavar="NAME", help="what clients call the model (default: MODEL as given)")
    add_template_flags(group)
    group.add_argument(
        "--tool-call-parser", default="auto", metavar="NAME",
        help="format of tool calls, docs/tools.md; none: no tools (default: auto, told by the chat template)",
    )  # fmt: skip
    group.add_argument(
        "--reasoning-parser", default="auto", metavar="NAME",
        help="format of the model's thoughts; none: they stay in the text (default: auto)",
    )  # fmt: skip
    group.add_argument(
        "--generation-config", default="auto", metavar="auto|lmdeploy|PATH",
        help="sampling defaults: the model's generation_config.json, none of it, or another folder's (default: auto)",
    )  # fmt: skip


def _add_access_flags(parser: Parser) -> None:
    group = parser.add_argument_group("access")
    add_api_keys_flag(group)
    group.add_argument(
        "--admin-api-key",
        metavar="KEY",
        help="opens /sleep, /wakeup, /update_weights, /abort_request and /terminate to its bearer; "
        "without it they are not there",
    )
    group.add_argument(
        "--weights-dir", type=Path, metavar="DIR", help="where /update_weights may take weights from (default: nowhere)"
    )
    group.add_argument("--allow-terminate-by-client", action="store_true", help="/terminate for every client")
    group.add_argument("--enable-abort-handling", action="store_true", help="/abort_request for every client")
    for name in ("origins", "methods", "headers"):
        group.add_argument(
            f"--allow-{name}", nargs="*", default=["*"], metavar="X", help=f"{name} of browsers' requests (default: *)"
        )
    group.add_argument("--allow-credentials", action="store_true", help="browsers may send cookies along")


def _add_later_flags(parser: Parser) -> None:
    group = parser.add_argument_group("for command lines that were written for LMDeploy")
    for flag in LATER_FLAGS:
        if flag.kind is bool:
            group.add_argument(flag.name, action="store_true", help=flag.help)
        else:
            group.add_argument(flag.name, type=flag.kind, default=flag.default, metavar="X", help=flag.help)
    for name in ("--allowed-media-domains", "--cudagraph-capture-batch-sizes"):
        group.add_argument(name, nargs="+", metavar="X", help="accepted; changes nothing")


def run(args: argparse.Namespace) -> int:
    if args.kind in OTHER_KINDS:
        return OTHER_KINDS[args.kind].run(args)
    warn_remote_code(args, tell)
    refuse_speculative(args)
    _refuse_later(args)
    require(_EXTRA, "the server", "serve")
    from lmdeploy.serve.parsers import REASONING_PARSERS, TOOL_PARSERS, pick
    from lmdeploy.serve.server import bind

    pick("--tool-call-parser", args.tool_call_parser, TOOL_PARSERS)  # a wrong name is told before the model is loaded
    pick("--reasoning-parser", args.reasoning_parser, REASONING_PARSERS)
    sock = bind(args.server_name, args.server_port)
    try:
        registration = _registration(args, sock)
        engine = _open(args)
    except BaseException:
        sock.close()
        raise
    try:
        return _serve(engine, args, sock, registration)
    finally:
        engine.close()


def _open(args: argparse.Namespace) -> AsyncEngine:
    from lmdeploy.async_engine import open_engine
    from lmdeploy.engine.config import EngineConfig
    from lmdeploy.engine.process import ProcessClient
    from lmdeploy.generation import CHAT_DEFAULTS, read_defaults
    from lmdeploy.logging import get_logger

    if args.log_level is not None:
        get_logger().setLevel(args.log_level)
    public, overrides = engine_settings(args, ENGINE_DEFAULTS)
    engine = open_engine(
        args.model,
        EngineConfig.from_public(public, **overrides),
        chat_template_config=template_config(args),
        defaults=CHAT_DEFAULTS,
        revision=public.revision,
        download_dir=public.download_dir,
        max_log_len=args.max_log_len,
        start=ProcessClient,
    )
    if args.generation_config == "lmdeploy":
        engine.generation_defaults = CHAT_DEFAULTS
    elif args.generation_config != "auto":
        engine.generation_defaults = read_defaults(_folder(args.generation_config), CHAT_DEFAULTS)
    return engine


def _folder(path: str) -> Path:
    folder = Path(path)
    if not (folder / "generation_config.json").is_file():
        raise ConfigError(
            f"--generation-config {path}: give auto, lmdeploy, or a folder that holds generation_config.json"
        )
    return folder


def _registration(args: argparse.Namespace, sock: socket) -> Registration | None:
    from lmdeploy import env
    from lmdeploy.serve.registration import Registration, reachable_url

    if args.proxy_url is None:
        return None
    port = sock.getsockname()[1]
    url = reachable_url(args.server_name, port, is_tls=args.ssl, proxy_url=args.proxy_url)
    key = env.api_key() or next(iter(args.api_keys), None)
    return Registration(args.proxy_url, url, [_settings(args).model_name], api_key=key)


def _serve(engine: AsyncEngine, args: argparse.Namespace, sock: socket, registration: Registration | None) -> int:
    from lmdeploy.serve.openai.app import create_app
    from lmdeploy.serve.request_log import log_as_json
    from lmdeploy.serve.server import Server

    info = engine.client.info
    settings = _settings(args)
    app = create_app(engine, settings)
    log_level = uvicorn_level(args.log_level)
    server = Server(app, drain_timeout_s=args.drain_timeout, log_level=log_level, tls=tls_files(args))
    if args.log_format == "json":
        log_as_json()
    tell(f"{info.architecture}, {info.dtype} on {info.device}, loaded in {info.load_s:.1f} s")
    width = max((len(name) for name, _ in info.memory_plan), default=0)
    for name, value in info.memory_plan:
        tell(f"  {name:<{width}}  {value}")
    tell(f"serving {settings.model_name} at {address(args, sock.getsockname()[1])}; Ctrl-C ends it")
    if registration is None:
        return server.run_on(sock)
    with registration.during(is_ready=lambda: server.started, is_draining=lambda: app.state.service.is_draining):
        return server.run_on(sock)


def _settings(args: argparse.Namespace) -> ServerSettings:
    from lmdeploy import hub
    from lmdeploy.serve.settings import ServerSettings

    is_builtin = hub.is_builtin(args.model)
    return ServerSettings(
        model_name=args.model_name or (hub.BUILTIN_NAME if is_builtin else args.model),
        api_keys=tuple(args.api_keys),
        max_concurrent_requests=args.max_concurrent_requests,
        max_queued_tokens=args.max_queued_tokens,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
        admin_api_key=args.admin_api_key,
        allow_terminate=args.allow_terminate_by_client,
        allow_abort=args.enable_abort_handling,
        weights_dir=args.weights_dir,
        has_request_log=args.log_format == "json",
        allow_origins=tuple(args.allow_origins),
        allow_methods=tuple(args.allow_methods),
        allow_headers=tuple(args.allow_headers),
        allow_credentials=args.allow_credentials,
        has_docs=not args.disable_fastapi_docs,
        has_metrics=not args.disable_metrics,
    )


def _refuse_later(args: argparse.Namespace) -> None:
    for flag in LATER_FLAGS:
        value = getattr(args, flag.dest)
        if value != flag.default and not flag.is_harmless:
            raise ConfigError(f"{flag.name} {value} is not supported yet; leave it out")
    for flag in LATER_FLAGS:
        if flag.is_harmless and getattr(args, flag.dest) != flag.default:
            print(f"note: {flag.name} has no effect in this engine", file=sys.stderr)
