"""Compares the engine with golden folders: `python -m tests.golden FOLDER...`, exit 1 if any of them differs.

A folder may also be a parent of golden folders. Each is materialized into a temporary checkpoint and answered through
the engine's public path in float32; one line a folder:

    llama/llama3.1 abs=1.2e-05 rel=8.1e-07 p0 16/16 p1 16/16 p2 16/16 ok

abs is the largest difference of a logit, rel the same over the largest logit of its prompt; pN counts the greedy tokens
that agree. The expected tokens are those that the original code decoded from its own cache; where there are none, those
that it got by computing the whole context anew for each token. With dynamic rope scaling that is not the same, and the
engine then computes anew, too: one request a token.
"""

from __future__ import annotations

import argparse
import queue
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lmdeploy.engine.client import EngineClient, ThreadClient
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.request import Request, RequestOutput, SamplingParams
from lmdeploy.models.config import load_config
from tests.goldens.materialize import materialize

MAX_RELATIVE_DIFFERENCE = 1e-3
MAX_RELATIVE_DIFFERENCE_16_BIT = 3e-2
MAX_FAILURE_CHARS = 160
GOLDEN_FILE = "golden.safetensors"


@dataclass
class Comparison:
    """What one folder's comparison found; `failure` is empty while nothing is wrong. matches: equal tokens by prompt."""

    name: str
    absolute: float = 0.0
    relative: float = 0.0
    matches: list[str] = field(default_factory=list)
    failure: str = ""

    def __str__(self) -> str:
        verdict = f"FAIL {self.failure}" if self.failure else "ok"
        return " ".join([self.name, f"abs={self.absolute:.3g}", f"rel={self.relative:.3g}", *self.matches, verdict])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden", description="Compare the engine with golden folders."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a golden folder, or a parent of some")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    args = parser.parse_args(argv)
    is_ok = True
    for root in args.folders:
        folders = find_folders(root)
        if not folders:
            print(f"{root} FAIL there is no {GOLDEN_FILE} in it or below it", flush=True)
            is_ok = False
        for folder in folders:
            comparison = compare_folder(folder, args.device, args.dtype)
            print(comparison, flush=True)
            is_ok = is_ok and not comparison.failure
    return 0 if is_ok else 1


def find_folders(root: Path) -> list[Path]:
    """root itself, or all folders below it, that hold golden outputs."""
    if (root / GOLDEN_FILE).is_file():
        return [root]
    return sorted(path.parent for path in root.rglob(GOLDEN_FILE))


def compare_folder(folder: Path, device: str = "auto", dtype: str = "float32") -> Comparison:
    """Run one folder. Whatever goes wrong is the comparison's failure: the other folders are compared all the same."""
    resolved = folder.resolve()
    comparison = Comparison(f"{resolved.parent.name}/{resolved.name}")
    try:
        with tempfile.TemporaryDirectory(prefix="golden-") as checkpoint:
            compare_checkpoint(
                materialize(folder, checkpoint), load_file(folder / GOLDEN_FILE), comparison, device, dtype
            )
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        comparison.failure = textwrap.shorten(f"{type(error).__name__}: {first_line}", MAX_FAILURE_CHARS)
    return comparison


def compare_checkpoint(
    checkpoint: Path, golden: dict[str, Tensor], comparison: Comparison, device: str, dtype: str
) -> None:
    """Answer every prompt of `golden` with the checkpoint's model and note the differences."""
    prompts = sorted(key.split(".")[0] for key in golden if key.endswith(".input_ids"))
    longest = max(golden[f"{prompt}.input_ids"].numel() + golden[f"{prompt}.greedy"].numel() for prompt in prompts)
    # Beyond the model's own length: dynamic rope scaling is only seen there.
    config = EngineConfig(dtype=dtype, device=device, session_len=longest, block_size=16, cache_max_entry_count=64)
    rope = load_config(checkpoint).rope
    is_dynamic = rope is not None and rope.kind.startswith("dynamic")
    client = ThreadClient(checkpoint, config)
    try:
        found = [compare_prompt(client, golden, prompt, comparison, is_dynamic) for prompt in prompts]
    finally:
        client.close()
    comparison.failure = "; ".join(filter(None, found))


def compare_prompt(
    client: EngineClient, golden: dict[str, Tensor], prompt: str, comparison: Comparison, is_dynamic: bool
) -> str:
    """Add one prompt's differences to the comparison; returns what is wrong with it, or an empty string."""
    prompt_ids = golden[f"{prompt}.input_ids"].tolist()
    expected_ids = golden.get(f"{prompt}.greedy_cached", golden[f"{prompt}.greedy"]).tolist()
    expected = golden[f"{prompt}.logits"].float()
    positions = golden.get(f"{prompt}.positions", torch.arange(len(prompt_ids)))
    ids, logits = answer(client, prompt_ids, len(expected_ids))
    is_exact = client.info.dtype == "float32"
    if not is_exact:  # decode steps that report nothing are those that run in graphs
        ids = answer(client, prompt_ids, len(expected_ids), has_logits=False)[0]
    if is_dynamic and f"{prompt}.greedy_cached" not in golden:
        ids = recompute(client, prompt_ids, len(expected_ids))
    num_equal = sum(a == b for a, b in zip(ids, expected_ids, strict=False))
    comparison.matches.append(f"{prompt} {num_equal}/{len(expected_ids)}")
    if len(logits) <= int(positions.max()) or logits.shape[1] < expected.shape[1]:
        return f"{prompt}: logits of shape {tuple(logits.shape)} do not cover the expected {tuple(expected.shape)}"
    difference = (logits[positions, : expected.shape[1]] - expected).abs().max().item()
    relative = difference / expected.abs().max().item()
    comparison.absolute = largest(comparison.absolute, difference)
    comparison.relative = largest(comparison.relative, relative)
    limit = MAX_RELATIVE_DIFFERENCE if is_exact else MAX_RELATIVE_DIFFERENCE_16_BIT
    if not relative <= limit:  # so that NaN fails
        return f"{prompt}: rel above {limit:g}"
    if ids != expected_ids and (is_exact or not is_tie(client, prompt_ids, expected_ids, ids, difference)):
        return f"{prompt}: {len(expected_ids) - num_equal} of {len(expected_ids)} tokens differ"
    return ""


def is_tie(
    client: EngineClient, prompt_ids: list[int], expected_ids: list[int], ids: list[int], difference: float
) -> bool:
    """Whether at the first different token the engine's own logits prefer it by less than twice their known error."""
    first = next(i for i, (a, b) in enumerate(zip(expected_ids, ids, strict=True)) if a != b)
    _, logits = answer(client, [*prompt_ids, *expected_ids[:first]], 1)
    return bool(logits[-1].max() - logits[-1, expected_ids[first]] <= 2 * difference)


def largest(*values: float) -> float:
    """The maximum; NaN if any value is."""
    return torch.tensor(values, dtype=torch.float64).max().item()


def recompute(client: EngineClient, prompt_ids: list[int], count: int) -> list[int]:
    """`count` greedy tokens, each from a request of its own, so that nothing comes from the cache."""
    ids: list[int] = []
    for _ in range(count):
        ids += answer(client, [*prompt_ids, *ids], 1)[0]
    return ids


def answer(
    client: EngineClient, prompt_ids: list[int], count: int, has_logits: bool = True
) -> tuple[list[int], Tensor]:
    """`count` greedy tokens that follow the prompt, end tokens taken as any other, and all positions' logits [n, V]."""
    outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    sampling = SamplingParams(max_new_tokens=count, return_logits="all" if has_logits else None)
    client.submit(Request("golden", prompt_ids, sampling), outputs.put)
    ids: list[int] = []
    pieces: list[Tensor] = []
    for output in until_finished(outputs):
        if output.error is not None:
            raise output.error
        ids += output.token_ids
        pieces += [] if output.logits is None else [output.logits]
    return ids, torch.cat(pieces) if pieces else torch.empty(0)


def until_finished(outputs: queue.SimpleQueue[RequestOutput]) -> Iterator[RequestOutput]:
    """The outputs of one request, the last one included."""
    while True:
        output = outputs.get()
        yield output
        if output.is_finished:
            return


if __name__ == "__main__":
    sys.exit(main())
