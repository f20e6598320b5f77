"""`lmdeploy serve api_client`: a chat at the terminal with a model that a server runs. It knows no engine."""

from __future__ import annotations

import argparse
import sys

from lmdeploy import env
from lmdeploy.cli.chat import add_sampling_flags, generation_config, tell
from lmdeploy.cli.parser import Parser

HELP = "chat at the terminal with a running server"
DESCRIPTION = """Chat with a model that a server runs: LMDeploy's, or any other with the interface of OpenAI.

At a terminal an empty line ends a prompt, `exit` quits, `end` forgets the conversation, `/help` lists the commands.
From a pipe a blank line or the end of input ends a prompt; answers are greedy and alone on stdout.
"""
DEFAULT_URL = "http://127.0.0.1:23333"


def add_arguments(parser: Parser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "api_server_url", nargs="?", default=DEFAULT_URL, metavar="URL", help=f"the server (default: {DEFAULT_URL})"
    )
    group = parser.add_argument_group("chat")
    add_remote_flags(group)
    group.add_argument("--system", metavar="TEXT", help="the system text; without it the template may bring its own")
    group.add_argument("--single-line", action=argparse.BooleanOptionalAction, help="Enter ends a prompt")
    add_sampling_flags(parser, "what the server chooses")


def add_remote_flags(group: argparse._ArgumentGroup) -> None:
    """Which model of a server, and the key to it."""
    group.add_argument(
        "--api-key", metavar="KEY", help="the server's key (default: the environment variable LMDEPLOY_API_KEY)"
    )
    group.add_argument("--model-name", metavar="NAME", help="which of the server's models (default: its first)")


def run(args: argparse.Namespace) -> int:
    from lmdeploy.cli.conversation import Conversation
    from lmdeploy.cli.repl import talk
    from lmdeploy.serve.openai.api_client import APIClient
    from lmdeploy.serve.remote import RemoteEngine

    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    config = generation_config(args, is_terminal)
    with APIClient(args.api_server_url, args.api_key or env.api_key()) as api:
        engine = RemoteEngine(api, args.model_name)
        tell(f"{engine.model_name} at {api.api_server_url}")
        talk(
            Conversation(engine, config, args.system),
            is_terminal=is_terminal,
            is_single_line=bool(args.single_line),
            history=env.cache_dir() / "chat_history",
        )
    return 0
