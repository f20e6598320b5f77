"""How many lines of the package one answer of `pipeline()` needs: `python -m tests.path_lines`, exit 1 above the limit.

A tiny Llama answers on the CPU; the lines of every lmdeploy module that is loaded then count, kernels aside.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from tests.goldens.materialize import materialize

LIMIT_LINES = 4_000
GOLDEN = Path(__file__).parent / "goldens" / "llama" / "llama3.1"


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


def loaded_lines() -> dict[str, int]:
    """Lines by module, for the loaded modules of the package outside its kernels."""
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "lmdeploy"}
    files = {
        name: Path(module.__file__)
        for name, module in modules.items()
        if getattr(module, "__file__", None) and not f"{name}.".startswith("lmdeploy.kernels.")
    }
    return {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in files.items()}


def main() -> int:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    with tempfile.TemporaryDirectory() as folder:
        answer_once(tiny_llama(Path(folder)))
    lines = loaded_lines()
    for name, count in sorted(lines.items(), key=lambda item: -item[1]):
        print(f"{count:6d}  {name}")
    total = sum(lines.values())
    print(f"{total:6d}  lines in {len(lines)} modules (limit {LIMIT_LINES})")
    return int(total > LIMIT_LINES)


if __name__ == "__main__":
    sys.exit(main())
