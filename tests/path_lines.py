"""How many lines of the package one answer of `pipeline()` needs: `python -m tests.path_lines`, exit 1 above the limit.

A tiny Llama 2 answers on the CPU; the lines of every lmdeploy module that is loaded then count, kernels aside. Two columns:
all lines, and code lines, which are neither blank nor comment nor docstring. The limit is one on code lines, so that
explaining costs nothing.
"""

from __future__ import annotations

import ast
import io
import json
import os
import sys
import tempfile
import tokenize
from pathlib import Path

from tests.goldens.materialize import materialize

LIMIT_CODE_LINES = 4_000
GOLDEN = Path(__file__).parent / "goldens" / "llama" / "llama2-mha"


def tiny_llama(folder: Path) -> Path:
    """A golden Llama checkpoint with a byte-level tokenizer beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    materialize(GOLDEN, folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def answer_once(model: Path) -> None:
    from lmdeploy import GenerationConfig, pipeline

    with pipeline(str(model)) as pipe:
        response = pipe("hello", gen_config=GenerationConfig(max_new_tokens=4, ignore_eos=True))
    if response.generate_token_len != 4:
        raise SystemExit(f"the tiny model did not answer: {response}")


def count_code_lines(source: str) -> int:
    """The lines of Python source that hold code: not blank, not only a comment, not part of a docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            statement = node.body[0]
            docstrings.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


def loaded_sources() -> dict[str, str]:
    """Source by module, for the loaded modules of the package outside its kernels."""
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "lmdeploy"}
    return {
        name: Path(module.__file__).read_text(encoding="utf-8")
        for name, module in modules.items()
        if getattr(module, "__file__", None) and not f"{name}.".startswith("lmdeploy.kernels.")
    }


def main() -> int:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    with tempfile.TemporaryDirectory() as folder:
        answer_once(tiny_llama(Path(folder)))
    counts = {name: (len(text.splitlines()), count_code_lines(text)) for name, text in loaded_sources().items()}
    print(" lines   code  module")
    for name, (lines, code) in sorted(counts.items(), key=lambda item: -item[1][1]):
        print(f"{lines:6d} {code:6d}  {name}")
    lines, code = (sum(column) for column in zip(*counts.values(), strict=True))
    print(f"{lines:6d} {code:6d}  in {len(counts)} modules (limit {LIMIT_CODE_LINES} code lines)")
    return int(code > LIMIT_CODE_LINES)


if __name__ == "__main__":
    sys.exit(main())
