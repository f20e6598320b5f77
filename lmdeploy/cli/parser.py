"""The argument parser that all commands share: short errors, a suggestion for what was misspelt. It knows no command."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"max_help_position": 34, **kwargs})


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; an unknown option or command is an error that names the closest known ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", _Formatter)
        super().__init__(*args, **kwargs)

    # The signature differs from typeshed's overloads only in their generic namespace.
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Exits with status 2 if anything is left over, so the second item is always empty."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._suggest(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Print the message and where help is, without the usage of some forty options; exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\nSee `{self.prog} --help`.\n")

    def options(self) -> dict[str, argparse.Action]:
        """Every option string of this parser, such as `--session-len`, and its action."""
        return dict(self._option_string_actions)

    def commands(self) -> dict[str, Parser]:
        """The sub-commands by name; empty for a parser that has none."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}

    def find(self, words: Sequence[str]) -> tuple[tuple[str, ...], Parser]:
        """The chain of sub-commands that the words begin with, and its parser."""
        path: tuple[str, ...] = ()
        parser = self
        for word in words:
            if word not in parser.commands():
                break
            path, parser = (*path, word), parser.commands()[word]
        return path, parser

    def _suggest(self, unknown: Sequence[str]) -> str:
        known = list(self.options())
        hints = []
        for word in unknown:
            name = word.split("=")[0]
            close = difflib.get_close_matches(name, known, 3, 0.7) if name.startswith("-") else []
            if close:
                hints.append(f"instead of {name} did you mean {' or '.join(close)}?")
        return "".join(f"\n{hint}" for hint in hints)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            close = difflib.get_close_matches(str(value), list(action.choices), 1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(action.choices)}"
            self.error(f"no such command: {value}{hint}")
        super()._check_value(action, value)
