"""Command lines as older versions wrote them, rewritten into today's. It parses nothing and knows no command's work.

Versions 0.1 to 0.3 were called through python-fire: `lmdeploy chat turbomind PATH --model_name X --stream_output True`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lmdeploy.cli.parser import Parser

_LITERALS = {"True": True, "true": True, "False": False, "false": False}


@dataclass(frozen=True)
class Era:
    """How one command used to be written. Options are spelt with dashes here.

    words: a word right after the command -> the options that replace it. renamed: option -> its name today.
    positional: options whose value is now the positional argument. dropped: option with a value -> why it is ignored.
    """

    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    positional: frozenset[str] = frozenset()
    dropped: Mapping[str, str] = field(default_factory=dict)


ERAS: dict[tuple[str, ...], Era] = {
    ("chat",): Era(
        words={
            "turbomind": ("--backend", "turbomind"),
            "torch": ("--backend", "pytorch"),
            "pytorch": ("--backend", "pytorch"),
        },
        renamed={
            "--model-name": "--chat-template",
            "--meta-instruction": "--system",
            "--cap": "--capability",
            "--request-output-len": "--max-new-tokens",
        },
        positional=frozenset({"--model", "--model-path"}),
        dropped={
            "--session-id": "one chat is one session",
            "--stream-output": "answers are always streamed",
        },
    ),
    ("serve", "api_server"): Era(
        renamed={"--instance-num": "--max-batch-size", "--cap": "--capability"},
        positional=frozenset({"--model", "--model-path"}),
        dropped={
            "--restful-api": "this server has no other interface",
            "--meta-instruction": "send it as a system message",
            "--qos-config-path": "there are no service classes",
        },
    ),
    ("serve", "api_client"): Era(
        renamed={"--request-output-len": "--max-new-tokens", "--meta-instruction": "--system"},
        positional=frozenset({"--api-server-url"}),
        dropped={
            "--session-id": "one chat is one session",
            "--stream-output": "answers are always streamed",
        },
    ),
    ("serve", "gradio"): Era(
        renamed={
            "--batch-size": "--max-batch-size",
            "--instance-num": "--max-batch-size",
            "--cap": "--capability",
            "--meta-instruction": "--system",
        },
        positional=frozenset({"--model-path-or-server", "--model-path"}),
        dropped={"--restful-api": "an address is told from a path"},
    ),
    **{
        ("lite", command): Era(positional=frozenset({"--model"}))
        for command in ("auto_awq", "auto_gptq", "smooth_quant", "calibrate")
    },
}


def modernise(argv: Sequence[str], parser: Parser) -> tuple[list[str], list[str]]:
    """The arguments in today's syntax, and a notice for each that was rewritten.

    parser: the top parser; it tells which command is meant and which of its options take no value.
    """
    path, command = parser.find(argv)
    era = ERAS.get(path, Era())
    rest, notices = _replace_word(list(argv[len(path) :]), era, path)
    positionals: list[str] = []
    result: list[str] = []
    while rest:
        token = rest.pop(0)
        if token == "--":
            result += [token, *rest]
            break
        if not token.startswith("--"):
            result.append(token)
            continue
        option, equals, value = token.partition("=")
        name = _today(option, era)
        if name in era.dropped or name in era.positional:
            taken = value if equals else _take_value(rest)
            if name in era.positional and taken is not None:
                positionals.append(taken)
            notices.append(_notice(option, name, era))
            continue
        literal = _literal(command, name, value if equals else (rest[0] if rest else ""))
        if literal is None:
            result.append(name + equals + value)
            if name != option:
                notices.append(f"`{option}` is now written `{name}`")
            continue
        if not equals:
            rest.pop(0)
        switch = _switch(command, name, literal)
        result += switch
        notices.append(
            f"`{option} {literal}` is now " + (f"written `{switch[0]}`" if switch else "written by leaving it out")
        )
    return [*path, *positionals, *result], notices


def _replace_word(rest: list[str], era: Era, path: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """`chat turbomind X` becomes `chat --backend turbomind X`; a lone `turbomind` is a model's path."""
    if len(rest) < 2 or rest[0] not in era.words:
        return rest, []
    options = era.words[rest[0]]
    old, new = " ".join((*path, rest[0])), " ".join((*path, *options))
    return [*options, *rest[1:]], [f"`{old}` is now written `{new}`"]


def _today(option: str, era: Era) -> str:
    dashed = "--" + option[2:].replace("_", "-")
    return era.renamed.get(dashed, dashed)


def _notice(option: str, name: str, era: Era) -> str:
    if name in era.positional:
        return f"`{option} X` is now written `X`"
    return f"`{option}` is ignored: {era.dropped[name]}"


def _take_value(rest: list[str]) -> str | None:
    return rest.pop(0) if rest and not rest[0].startswith("--") else None


def _literal(command: Parser, name: str, value: str) -> bool | None:
    """The boolean that follows an option which takes no value; None if there is none."""
    action = command.options().get(name)
    return _LITERALS.get(value) if action is not None and action.nargs == 0 else None


def _switch(command: Parser, name: str, is_on: bool) -> list[str]:
    if is_on:
        return [name]
    has_negative = isinstance(command.options()[name], argparse.BooleanOptionalAction)
    return [f"--no-{name[2:]}"] if has_negative else []
