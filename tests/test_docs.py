"""What the pages under docs/ say, held to the code. `python -m tests.test_docs` writes the table of flags anew."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lmdeploy.cli.main import make_parser
from lmdeploy.cli.parser import Parser
from lmdeploy.engine.config import TRANSLATED, EngineConfig
from lmdeploy.errors import ConfigError, InvalidParameter
from lmdeploy.generation import sampling_params
from lmdeploy.logging import get_logger
from lmdeploy.messages import GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.models import weight_rules, weights
from lmdeploy.models.base import CausalLM
from lmdeploy.models.config import ModelConfig
from lmdeploy.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BEGIN, END = "<!-- begin flags: written by `python -m tests.test_docs` -->\n", "<!-- end flags -->\n"
# Fields that someone other than the engine's config acts on.
ACTED_ON_BEFORE = {"revision", "download_dir", "model_name"}
# A value, other than the default, where the type alone does not give a valid one.
PROBES = {
    "response_format": {"type": "json_object"},
    "dtype": "float32",
    "device_type": "cpu",
    "quant_policy": 8,
    "temperature": 0.5,
    "cache_max_entry_count": 0.5,
    "hf_overrides": {"rope_theta": 1.0},
    "output_logits": "all",
    "output_last_hidden_state": "all",
    "stop_words": ["x"],
    "bad_words": ["x"],
    "stop_token_ids": [1],
    "bad_token_ids": [1],
    "logit_bias": {1: 1.0},
    "max_new_tokens": 3,
    "top_p": 0.5,
    "min_p": 0.5,
}


def read(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, backquotes removed, without its head."""
    rows = []
    for line in text.split(f"{heading}\n", 1)[1].splitlines():
        if line.startswith("|"):
            rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


# ---- links ----


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith(("http:", "https:")) and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("name", ["README.md", "README_zh-CN.md"])
def test_every_page_is_linked_from_the_readme(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in text]


# ---- adding_a_model.md ----


def hunks(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """(path, whether the file is new, lines after the change) of each hunk of each diff block."""
    for block in re.findall(r"```diff\n(.*?)```", text, re.DOTALL):
        path, is_new, lines = "", False, []
        for line in block.splitlines():
            if line.startswith(("--- ", "+++ ", "@@")):
                if lines:
                    yield path, is_new, lines
                lines = []
                is_new = line == "--- /dev/null" if line.startswith("--- ") else is_new
                path = line.removeprefix("+++ b/") if line.startswith("+++ ") else path
            elif line.startswith(("+", " ")):
                lines.append(line[1:])
            else:
                raise AssertionError(f"a line that the test does not know: {line!r}")
        yield path, is_new, lines


def test_the_diffs_of_the_example_are_what_the_tree_has() -> None:
    found = list(hunks(read("adding_a_model.md")))
    assert {path for path, _, _ in found} >= {"lmdeploy/models/glm4.py", "lmdeploy/models/__init__.py"}
    for path, is_new, lines in found:
        text, shown = (ROOT / path).read_text(encoding="utf-8"), "\n".join(lines) + "\n"
        assert text.rstrip("\n") == shown.rstrip("\n") if is_new else shown in text, (
            f"{path} has changed: mend the page"
        )


def test_the_golden_of_the_example_has_every_file_the_page_names() -> None:
    files = {path.name for path in (ROOT / "tests/goldens/glm4/0414").iterdir()}
    assert files >= {"config.json", "spec.json", "golden.safetensors", "README.md"}


def test_the_tables_for_model_authors_are_complete() -> None:
    text = read("adding_a_model.md")
    modules = ((weights, {"Piece", "WeightMap", "Rule"}), (weight_rules, set()))
    rules = {
        name for m, other in modules for name, one in vars(m).items() if hasattr(one, "apply") and name not in other
    }
    assert {row[0] for row in table(text, "## Weight map")} == rules
    hooks = {name for row in table(text, "## Seams") for name in row[0].split(", ")}
    assert hooks - {"layer_class"} == {name for name in vars(CausalLM) if name.startswith("make_")}
    variants = {name for row in table(text, "## Attention variants") for name in row[0].split(", ")}
    assert variants <= {field.name for field in fields(ModelConfig)}


# ---- configuration.md ----


@pytest.fixture
def notices() -> Iterator[list[str]]:
    """What the package's logger says."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    get_logger().addHandler(handler)
    yield said
    get_logger().removeHandler(handler)


def probe(name: str, default: Any, hint: str) -> Any:
    """Some value of the field that is not its default."""
    if name in PROBES:
        return PROBES[name]
    if isinstance(default, bool) or "bool" in hint:
        return not default
    if "int" in hint or "float" in hint:
        return 3 if not isinstance(default, float) else 2.0
    return "x"


def is_read(name: str) -> bool:
    """Whether any module asks an engine config for this field."""
    sources = [p for p in (ROOT / "lmdeploy").rglob("*.py") if "cli" not in p.parts]
    return any(re.search(rf"\b(self|config)\.{name}\b", p.read_text(encoding="utf-8")) for p in sources)


def engine_status(config: Any, name: str, notices: list[str]) -> str:
    """What happens to a field that is set."""
    notices.clear()
    try:
        translated = EngineConfig.from_public(config)
    except ConfigError as error:
        if "not supported yet" not in str(error):
            raise
        return "refused"
    if name in ACTED_ON_BEFORE:
        return "applies"
    changed = translated != EngineConfig.from_public() and not any("no effect" in text for text in notices)
    return "applies" if changed and is_read(TRANSLATED[name]) else "no effect"


def test_engine_settings(notices: list[str]) -> None:
    rows = {row[0]: row[1:] for row in table(read("configuration.md"), "## Engine: either class")}
    expected: dict[str, list[str]] = {}
    for letter, kind in (("T", TurbomindEngineConfig), ("P", PytorchEngineConfig)):
        for field in fields(kind):
            config = kind(**{field.name: probe(field.name, field.default, str(field.type))})
            status = engine_status(config, field.name, notices)
            letters = f"{expected[field.name][1]} {letter}" if field.name in expected else letter
            expected[field.name] = [repr(field.default), letters, status]
    assert {name: row[:3] for name, row in rows.items()} == expected


def test_settings_of_an_answer() -> None:
    rows = {row[0]: row[1:] for row in table(read("configuration.md"), "## One answer: `GenerationConfig`")}
    assert {name: row[0] for name, row in rows.items()} == {f.name: repr(f.default) for f in fields(GenerationConfig)}
    tokenizer = cast(Tokenizer, SimpleNamespace(encode=lambda text, **_: [5], token_to_bytes=lambda token: b"x"))
    refused = set()
    for field in fields(GenerationConfig):
        config = GenerationConfig(**{field.name: probe(field.name, field.default, str(field.type))})
        try:
            sampling_params(config, tokenizer, end_token_ids=[2], max_new_tokens=4)
        except InvalidParameter as error:
            if "not supported yet" not in str(error):
                raise
            refused.add(field.name)
    assert {name for name, row in rows.items() if row[1] == "refused"} == refused


def test_environment_variables() -> None:
    source = (ROOT / "lmdeploy" / "env.py").read_text(encoding="utf-8")
    read_there = set(re.findall(r"(?:environ\.get|flag)\(\s*\"([A-Z_]+)\"", source))
    rows = table(read("configuration.md"), "## Environment variables")
    assert {name for row in rows for name in row[0].split(", ")} == read_there


# ---- cli.md ----


def leaf_parsers() -> dict[str, Parser]:
    """Commands as they are typed, and their parsers; modes of one command that share all flags count as one."""
    found: dict[str, Parser] = {}
    for name, parser in make_parser().commands().items():
        modes = parser.commands()
        if len({frozenset(mode.options()) for mode in modes.values()}) > 1:
            found.update({f"{name} {mode}": leaf for mode, leaf in modes.items()})
        else:
            found[name] = next(iter(modes.values()), parser)
    return found


def spelled(action: argparse.Action) -> str:
    """The flag as it is typed, such as `--tp N`."""
    names = [name for name in action.option_strings if name.startswith("--")]
    value = "" if action.nargs == 0 else f" {action.metavar or '{' + ','.join(map(str, action.choices or ())) + '}'}"
    return ", ".join(f"`{name}{value}`" for name in names).replace("|", "\\|")


def flag_table() -> str:
    """Every flag of every command, those that several commands share once."""
    rows: dict[tuple[str, str], list[str]] = {}
    for command, parser in leaf_parsers().items():
        for action in dict.fromkeys(parser.options().values()):
            if action.dest != "help":
                meaning = " ".join((action.help or "").split()).replace("|", "\\|")
                rows.setdefault((spelled(action), meaning), []).append(command)
    lines = [f"| {flag} | {', '.join(commands)} | {meaning} |" for (flag, meaning), commands in rows.items()]
    return "\n".join(["| flag | command | meaning |", "|---|---|---|", *lines]) + "\n"


def test_the_table_of_flags_is_that_of_the_parser() -> None:
    text = read("cli.md")
    assert text.split(BEGIN)[1].split(END)[0] == flag_table(), "run `python -m tests.test_docs`"
    assert {name for name in make_parser().commands() if f"| `lmdeploy {name}" in text} == set(make_parser().commands())


if __name__ == "__main__":
    page = ROOT / "docs" / "cli.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + BEGIN + flag_table() + END + rest.split(END)[1], encoding="utf-8")
