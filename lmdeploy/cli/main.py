"""`lmdeploy`: finds the command, parses its flags in every era's spelling, turns errors into one line.

It imports neither torch nor any library that a command needs; commands do so when they run.
"""
# PYTHON_ARGCOMPLETE_OK

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lmdeploy.cli import bench, chat, check_env, completion, convert, eras, lite, serve
from lmdeploy.cli import list as list_command
from lmdeploy.cli.parser import Parser
from lmdeploy.errors import LMDeployError
from lmdeploy.version import __version__

COMMANDS = {
    "chat": chat,
    "serve": serve,
    "list": list_command,
    "check_env": check_env,
    "bench": bench,
    "lite": lite,
    "convert": convert,
    "completion": completion,
}
_ALIASES = {"check-env": "check_env"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, that of the process by default, and return the exit status.

    Raises SystemExit where argparse does: 0 after help or version, 2 for a command line that cannot be parsed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    arguments[:1] = [_ALIASES.get(word, word) for word in arguments[:1]]
    arguments, notices = eras.modernise(arguments, parser)
    for notice in notices:
        print(f"note: {notice}", file=sys.stderr)
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return int(COMMANDS[args.command].run(args))
    except LMDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Nobody reads on; what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="lmdeploy", description="Compress, deploy and serve large language models.")
    parser.add_argument("-v", "--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP))
    return parser


if __name__ == "__main__":
    sys.exit(main())
