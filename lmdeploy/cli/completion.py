"""`lmdeploy completion`: prints what makes a shell complete lmdeploy's commands and flags."""

from __future__ import annotations

import argparse

from lmdeploy.cli.parser import Parser

HELP = "print the code that completes commands and flags in your shell"
DESCRIPTION = """Print the shell code that completes lmdeploy's commands and flags.

  bash   add to ~/.bashrc:                  eval "$(lmdeploy completion bash)"
  zsh    add to ~/.zshrc, after compinit:   eval "$(lmdeploy completion zsh)"
  fish   run once:                          lmdeploy completion fish > ~/.config/fish/completions/lmdeploy.fish
"""


def add_arguments(parser: Parser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(args: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["lmdeploy"], shell=args.shell))
    return 0
