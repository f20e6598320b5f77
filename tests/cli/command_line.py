"""Parses command lines as `lmdeploy` would, without running them, and runs them as a user would."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from lmdeploy.cli import eras
from lmdeploy.cli.main import make_parser

ROOT = Path(__file__).parent.parent.parent


def parse(line: str) -> argparse.Namespace:
    """The parsed arguments of `lmdeploy ...`, old syntax rewritten."""
    return parse_with_notices(line)[0]


def parse_with_notices(line: str) -> tuple[argparse.Namespace, list[str]]:
    words = shlex.split(line.replace("\\\n", ""))
    assert words.pop(0) == "lmdeploy"
    parser = make_parser()
    arguments, notices = eras.modernise(words, parser)
    return parser.parse_args(arguments), notices


def run_lmdeploy(
    *arguments: str, stdin: str = "", env: Mapping[str, str] | None = None, timeout: float = 50
) -> subprocess.CompletedProcess[str]:
    """Run `python -m lmdeploy` in the repository with stdin from a pipe."""
    command = [sys.executable, "-m", "lmdeploy", *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=env, check=False
    )
