"""Limits that keep the code readable and safe: sizes, forbidden calls, tests that assert, light imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500
MAX_MEDIAN_MODEL_LINES = 120
SOURCES = sorted(p for folder in ("lmdeploy", "tests", "benchmarks", "examples") for p in (ROOT / folder).rglob("*.py"))
PACKAGE = [p for p in SOURCES if p.is_relative_to(ROOT / "lmdeploy")]
TEST_FILES = [p for p in SOURCES if p.name.startswith("test_")]
FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_METHODS = {"recv_pyobj", "send_pyobj"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Check = Callable[[ast.AST], Iterator[tuple[int, str]]]


def findings(files: list[Path], check: Check) -> list[str]:
    """Every finding of `check`, as `file:line what`."""
    found = []
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        found += [f"{path.relative_to(ROOT)}:{line} {what}" for line, what in check(tree)]
    return found


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def long_functions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in functions(tree):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield node.lineno, f"{node.name} has {lines} lines"


def unsafe_code(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Code that could run what it reads: pickle and its kin, eval, exec, unrestricted torch.load and numpy.load."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((node.lineno, f"imports {n}") for n in names if n.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Call) and (what := unsafe_call(node)):
            yield node.lineno, what


def unsafe_call(call: ast.Call) -> str | None:
    name = ast.unparse(call.func)
    options = {k.arg: isinstance(k.value, ast.Constant) and k.value.value for k in call.keywords}
    if name in ("eval", "exec") or name.split(".")[-1] in FORBIDDEN_METHODS:
        return f"calls {name}"
    if name == "torch.load" and options.get("weights_only") is not True:
        return "calls torch.load without weights_only=True"
    if options.get("allow_pickle") is True:
        return f"calls {name} with allow_pickle=True"
    return None


def silent_tests(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in functions(tree):
        if node.name.startswith("test") and not any(asserts(part) for part in ast.walk(node)):
            yield node.lineno, f"{node.name} asserts nothing"


def asserts(node: ast.AST) -> bool:
    """Whether the node can fail a test: an assert of something not constant, pytest.raises, a check of our own."""
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant)
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func).split(".")[-1]
    return name in ("raises", "warns") or "check" in name or "assert" in name


def test_functions_are_short() -> None:
    assert not findings([p for p in SOURCES if "kernels" not in p.parts], long_functions)


def test_files_are_short() -> None:
    lines = {p.relative_to(ROOT): len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCES}
    assert not {p: n for p, n in lines.items() if n > MAX_FILE_LINES and "kernels" not in p.parts}


def words_of(text: str) -> str:
    """Lower case, with spaces for underscores and between the words of a camel-case name."""
    return re.sub(r"_|(?<=[a-z0-9])(?=[A-Z])", " ", text).lower()


def named_models(text: str) -> list[str]:
    """The families that a text names. Names of rope scalings do not count: the config format has one called llama3."""
    from lmdeploy.models import ARCHITECTURES
    from lmdeploy.models.model_types import MODEL_TYPES
    from lmdeploy.models.rope_scalings import SCALINGS

    files = {home.split(":")[0] for home in ARCHITECTURES.values()}
    names = {words_of(name) for name in {*files, *MODEL_TYPES, *(name.split("For")[0] for name in ARCHITECTURES)}}
    for kind in SCALINGS:
        text = text.replace(kind, "")
    longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.findall(rf"(?<![a-z])(?:{longest_first})(?![a-z])", words_of(text))


def test_model_files_are_short() -> None:
    from lmdeploy.models import ARCHITECTURES

    files = {ROOT / "lmdeploy" / "models" / f"{home.split(':')[0]}.py" for home in ARCHITECTURES.values()}
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in files]
    assert median(lines) <= MAX_MEDIAN_MODEL_LINES


def test_only_models_know_names_of_models() -> None:
    below = [
        p
        for p in PACKAGE
        if p.relative_to(ROOT / "lmdeploy").parts[0] in ("layers", "kernels", "quantization", "engine")
    ]
    found = {str(p.relative_to(ROOT)): names for p in below if (names := named_models(p.read_text(encoding="utf-8")))}
    assert len(below) > 30
    assert not found


def test_nothing_runs_what_it_reads() -> None:
    assert not findings(SOURCES, unsafe_code)


def test_every_test_asserts() -> None:
    assert not findings(TEST_FILES, silent_tests)


def test_no_file_of_odds_and_ends() -> None:
    assert not [p for p in PACKAGE if p.stem in ("utils", "helpers", "common", "misc")]


def test_the_checks_themselves_find() -> None:
    bad = "import pickle\nfrom dill import x\neval('1')\ntorch.load(f)\nnp.load(f, allow_pickle=True)\ns.recv_pyobj()"
    assert [line for line, _ in unsafe_code(ast.parse(bad))] == [1, 2, 3, 4, 5, 6]
    good = "model.eval()\ntorch.load(f, weights_only=True)\nnp.load(f)\n"
    assert not list(unsafe_code(ast.parse(good)))
    tests = "def test_a(): run()\ndef test_b(): assert True\ndef test_c(): check(1)\ndef test_d(): assert x\n"
    assert [what.split()[0] for _, what in silent_tests(ast.parse(tests))] == ["test_a", "test_b"]
    text = "Falcon(), 'llama3', MixtralForCausalLM, gpt_oss, qwen2_scale, a llama, llamas, phi"
    assert named_models(text) == ["falcon", "mixtral", "gpt oss", "qwen2", "llama"]
    long = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    assert [line for line, _ in long_functions(ast.parse(long))] == [1]


def test_import_is_light() -> None:
    code = (
        "import sys, lmdeploy; dir(lmdeploy); lmdeploy.GenerationConfig; lmdeploy.__version__\n"
        "print(*sorted({'torch', 'transformers', 'numpy', 'huggingface_hub', 'rich'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, cwd=ROOT)
    assert (answer.returncode, answer.stdout.strip()) == (0, ""), answer.stderr


def test_public_names_load() -> None:
    import lmdeploy

    assert [name for name in lmdeploy.__all__ if getattr(lmdeploy, name, None) is None] == []
    assert not hasattr(lmdeploy, "no_such_name")


def test_the_path_to_a_token_is_short() -> None:
    command = [sys.executable, "-m", "tests.path_lines"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=55, cwd=ROOT)
    assert answer.returncode == 0, answer.stdout + answer.stderr
