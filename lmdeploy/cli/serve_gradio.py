"""`lmdeploy serve gradio`: a chat page in the browser, over a model loaded here or a server. It knows no widget."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy import env
from lmdeploy.cli.chat import add_speculative_flags, add_template_flags, refuse_speculative, tell, template_config
from lmdeploy.cli.flags import ENGINE_FLAGS, add_engine_flags, engine_settings, warn_remote_code
from lmdeploy.cli.listening import add_address_flags, require
from lmdeploy.cli.parser import Parser
from lmdeploy.cli.serve_client import add_remote_flags

if TYPE_CHECKING:
    from lmdeploy.async_engine import AsyncEngine
    from lmdeploy.serve.remote import RemoteEngine

HELP = "a chat page in the browser"
DESCRIPTION = """Chat with a model in the browser.

The model is loaded here, or, where an address such as http://127.0.0.1:23333 is given, is that of a running server.
"""
ENGINE_DEFAULTS: dict[str, Any] = {"enable_prefix_caching": True}
DEFAULT_PORT = 6006
_EXTRA = ("gradio",)


def add_arguments(parser: Parser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL|URL",
        help="a model folder, a .gguf file, a hub id or a server's address; left out: the built-in smollm2-135m-instruct",
    )
    page = parser.add_argument_group("page")
    add_address_flags(page, DEFAULT_PORT)
    page.add_argument("--share", action="store_true", help="also make a public address, through gradio's service")
    page.add_argument("--system", metavar="TEXT", help="the system text that the page begins with")
    add_remote_flags(page)
    add_template_flags(page)
    add_engine_flags(parser, ENGINE_DEFAULTS)
    add_speculative_flags(parser)


def run(args: argparse.Namespace) -> int:
    warn_remote_code(args, tell)
    refuse_speculative(args)
    require(_EXTRA, "the chat page", "gradio")
    from lmdeploy.serve.server import bind

    with bind(args.server_name, args.server_port) as sock:  # a port in use is told before a model is loaded
        port = sock.getsockname()[1]
    is_remote = server_url(args.model) is not None
    engine = _open_remote(args) if is_remote else _open(args)
    try:
        from lmdeploy.serve.gradio.app import PageSettings, run_page

        settings = PageSettings(_name(args, engine), args.system or "", args.server_name, port, args.share)
        return run_page(engine, settings, tell)
    finally:
        engine.close()


def server_url(model: str | None) -> str | None:
    """The address of a server, if that is what was given: with a scheme, or HOST:PORT that is no file."""
    if model is None or Path(model).exists():
        return None
    if re.match(r"https?://", model, re.IGNORECASE):
        return model
    return f"http://{model}" if re.fullmatch(r"[\w.-]+:\d{1,5}", model) else None


def _open_remote(args: argparse.Namespace) -> RemoteEngine:
    from lmdeploy.serve.openai.api_client import APIClient
    from lmdeploy.serve.remote import RemoteEngine

    for flag in ENGINE_FLAGS:
        if hasattr(args, flag.field):
            tell(f"note: {flag.name} has no effect: the server at {args.model} has its own engine")
    api = APIClient(server_url(args.model) or "", args.api_key or env.api_key())
    try:
        return RemoteEngine(api, args.model_name)
    except BaseException:
        api.close()
        raise


def _open(args: argparse.Namespace) -> AsyncEngine:
    from lmdeploy.async_engine import open_engine
    from lmdeploy.engine.config import EngineConfig
    from lmdeploy.generation import CHAT_DEFAULTS

    public, overrides = engine_settings(args, ENGINE_DEFAULTS)
    return open_engine(
        args.model,
        EngineConfig.from_public(public, **overrides),
        chat_template_config=template_config(args),
        defaults=CHAT_DEFAULTS,
        revision=public.revision,
        download_dir=public.download_dir,
    )


def _name(args: argparse.Namespace, engine: AsyncEngine | RemoteEngine) -> str:
    from lmdeploy import hub

    given = args.model_name or getattr(engine, "model_name", None)
    return str(given or (hub.BUILTIN_NAME if hub.is_builtin(args.model) else Path(args.model).name or args.model))
