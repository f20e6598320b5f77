"""Write a golden folder from a config.json alone: seeded weights and the answers of the transformers class.

Needs `transformers`. The first seed is taken whose greedy tokens are all clear (top-1 minus top-2 of at least MARGIN) and
varied. Usage: ``python make_golden.py FOLDER "what this variant shows"`` with FOLDER/config.json in place.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from materialize import materialize
from safetensors.torch import save_file
from torch import Tensor

MARGIN = 0.03
PROMPT_LENGTHS = (6, 19, 96)
NEW_TOKENS = 16
MAX_SEEDS = 300
LINE = '   "{}": {}'


def weight_entries(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """One spec.json entry per parameter, scaled so that every matrix keeps the size of what passes through it."""
    entries = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        entry = {"shape": list(tensor.shape), "dtype": "bfloat16", "scale": 0.5, "offset": 0.0}
        if tensor.ndim > 1:
            entry["scale"] = 1.0 if "embed" in name else round(2.6 / math.sqrt(tensor.shape[-1]), 2)
        elif "norm" in name:
            entry["offset"] = 1.0
        elif "correction_bias" in name:
            entry["scale"] = 0.2
        entries[name] = entry
    return entries


def write_spec(folder: Path, seed: int, entries: dict[str, dict[str, Any]]) -> None:
    """spec.json with one line per tensor."""
    lines = ",\n".join(LINE.format(name, json.dumps(entry)) for name, entry in entries.items())
    text = f'{{\n "seed": {seed},\n "files": {{\n  "model.safetensors": {{\n{lines}\n  }}\n }},\n "indexes": {{}}\n}}\n'
    (folder / "spec.json").write_text(text, encoding="utf-8")


@torch.inference_mode()
def greedy(model: Any, ids: Tensor, cached: bool) -> tuple[list[int], list[float]]:
    """NEW_TOKENS greedy tokens and their margins, with the model's own cache or recomputing everything each time."""
    tokens: list[int] = []
    margins: list[float] = []
    cache, new = None, ids
    for _ in range(NEW_TOKENS):
        out = model(new[None], past_key_values=cache, use_cache=cached)
        top = out.logits[0, -1].topk(2)
        tokens.append(int(top.indices[0]))
        margins.append(float(top.values[0] - top.values[1]))
        ids = torch.cat((ids, top.indices[:1]))
        cache, new = (out.past_key_values, ids[-1:]) if cached else (None, ids)
    return tokens, margins


@torch.inference_mode()
def answers(model: Any, seed: int) -> dict[str, Tensor] | None:
    """The content of golden.safetensors, or None if some token is a close call or the tokens hardly differ.

    Every run gets its own copy of the model: a dynamic rotary embedding remembers the longest input it has seen.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for index, length in enumerate(PROMPT_LENGTHS):
        ids = torch.randint(3, model.config.vocab_size, (length,), generator=generator)
        tokens, margins = greedy(deepcopy(model), ids, cached=False)
        cached_tokens, cached_margins = greedy(deepcopy(model), ids, cached=True)
        if min(margins + cached_margins) < MARGIN or len(set(tokens)) < 4:
            return None
        out = deepcopy(model)(ids[None], output_hidden_states=True)
        logits = out.logits[0]
        found |= {
            f"p{index}.input_ids": ids,
            f"p{index}.greedy": torch.tensor(tokens),
            f"p{index}.greedy_cached": torch.tensor(cached_tokens),
            f"p{index}.greedy_margin": torch.tensor(margins),
        }
        if index == 0:
            found["p0.hidden.last"] = out.hidden_states[-1][0].contiguous()
        if index == 2:
            found["p2.positions"] = torch.tensor([*range(0, length, 8), length - 1])
            logits = logits[found["p2.positions"]]
        found[f"p{index}.logits"] = logits.contiguous()
    return found


def make(folder: Path, variant: str) -> None:
    """Fill the folder, trying one seed after the other."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        shapes = transformers.AutoModelForCausalLM.from_config(config)
    entries = weight_entries(shapes)
    for seed in range(MAX_SEEDS):
        write_spec(folder, seed, entries)
        with tempfile.TemporaryDirectory() as out:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                materialize(folder, out), dtype=torch.float32, attn_implementation="eager"
            ).eval()
        found = answers(model, seed)
        if found is not None:
            break
    else:
        raise SystemExit(f"{folder}: no seed gives clear tokens")
    source = f"huggingface transformers {transformers.__version__} in-library modeling code"
    save_file(found, folder / "golden.safetensors", {"source": source, "flags": variant})
    (folder / "README.md").write_text(
        f"Made by: {source}, torch {torch.__version__}, float32 CPU, on the weights of spec.json (seed {seed}).\n"
        f"Variant: {variant}\n",
        encoding="utf-8",
    )
    print(folder, "seed", seed, "margin", min(float(found[f"p{i}.greedy_margin"].min()) for i in range(3)))


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2])
