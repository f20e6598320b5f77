"""`lmdeploy list`: the architectures, chat templates and quantization formats that this version knows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from lmdeploy.cli.parser import Parser

HELP = "list supported models, chat templates and quantization formats"
Table = tuple[str, Sequence[str], Sequence[tuple[str, ...]]]


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--engine",
        choices=("turbomind", "pytorch"),
        default="turbomind",
        help="accepted from older versions; one engine runs all that is listed (default: turbomind)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    tables = collect()
    if args.json:
        print(json.dumps({title: [row[0] for row in rows] for title, _, rows in tables}))
    elif sys.stdout.isatty():
        _print_rich(tables)
    else:
        print("\n\n".join(as_text(table) for table in tables))
    return 0


def collect() -> list[Table]:
    """Title, column names and rows of each table."""
    from lmdeploy.chat_template import CHAT_TEMPLATES
    from lmdeploy.chat_template.guess import template_of
    from lmdeploy.chat_template.named import TEMPLATE_ALIASES
    from lmdeploy.models import ARCHITECTURES
    from lmdeploy.quantization import QUANTIZATION

    models = [
        (name, home.split(":")[0], template_of(name) or "by vocabulary", "text only")
        for name, home in sorted(ARCHITECTURES.items(), key=lambda item: item[0].lower())
    ]
    aliases = {name: sorted(alias for alias, of in TEMPLATE_ALIASES.items() if of == name) for name in CHAT_TEMPLATES}
    templates = [(name, ", ".join(aliases[name])) for name in sorted(CHAT_TEMPLATES)]
    return [
        ("architectures", ("architecture", "family", "template if it has none of its own", "vision"), models),
        ("chat_templates", ("chat template", "also called"), templates),
        ("quantization", ("format of weights",), [(name,) for name in sorted(QUANTIZATION)]),
    ]


def as_text(table: Table) -> str:
    """A title and aligned rows."""
    title, _, rows = table
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join([f"{title}:", *(f"  {line}".rstrip() for line in lines)])


def _print_rich(tables: list[Table]) -> None:
    import rich.console
    import rich.table

    console = rich.console.Console()
    for title, columns, rows in tables:
        table = rich.table.Table(*columns, title=title.replace("_", " "), title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
