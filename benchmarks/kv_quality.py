"""Perplexity of a text under every kind of quantized KV cache: `python benchmarks/kv_quality.py TEXT [MODEL] [--out FILE]`.

Prompts are computed in 64-token chunks, so that a chunk reads all earlier ones back from the cache, as decoding would. The
kind `int4 unrotated` is no policy of the engine: it shows what the Hadamard rotation is worth.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.engine.request import Request, SamplingParams
from lmdeploy.hub import resolve
from lmdeploy.kernels.reference.quantized_cache import CodeFormat
from lmdeploy.layers.quantized_cache import FORMATS, QuantizedKVCache
from lmdeploy.messages import QuantPolicy
from lmdeploy.tokenizer import Tokenizer

CHUNK_TOKENS = 64
INT4_UNROTATED = "int4 unrotated"
KINDS = [*(policy.name.lower() for policy in (QuantPolicy.NONE, *FORMATS)), INT4_UNROTATED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a file of running text in UTF-8")
    parser.add_argument("model", nargs="?", help="a model folder, GGUF file or hub id; the built-in model if left out")
    parser.add_argument("--window", type=int, default=2048, help="tokens of each window; windows do not overlap")
    parser.add_argument("--windows", type=int, default=4, help="how many windows from the start of the text")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    path = resolve(args.model)
    ids = Tokenizer(path).encode(args.text.read_text(encoding="utf-8"), add_bos=False)
    windows = [ids[start : start + args.window] for start in range(0, args.windows * args.window, args.window)]
    rows: dict[str, dict[str, Any]] = {}
    for kind in ["none", *(kind for kind in args.kinds if kind != "none")]:
        rows[kind] = measure(path, windows, kind, args.dtype)
        rows[kind]["change_percent"] = 100 * (rows[kind]["perplexity"] / rows["none"]["perplexity"] - 1)
        print(kind, json.dumps(rows[kind]), file=sys.stderr, flush=True)
    settings = {"model": path.name, "text": args.text.name, "dtype": args.dtype, "window": args.window}
    settings |= {"windows": len(windows), "chunk_tokens": CHUNK_TOKENS, "torch": torch.__version__}
    result = json.dumps({**settings, "kinds": rows}, indent=2)
    print(result)
    if args.out is not None:
        args.out.write_text(result + "\n", encoding="utf-8")


def measure(path: Path, windows: list[list[int]], kind: str, dtype: str) -> dict[str, Any]:
    """Perplexity of all scored tokens together, bytes of a token in the cache, seconds of the run."""
    policy = QuantPolicy.INT4 if kind == INT4_UNROTATED else QuantPolicy[kind.upper()]
    window = len(windows[0])
    config = EngineConfig(
        dtype=dtype,
        session_len=window + 1,
        max_batch_size=1,
        max_prefill_token_num=CHUNK_TOKENS,
        cache_max_entry_count=window // 64 + 2,
        quant_policy=policy,
    )
    engine = Engine(path, config)
    if kind == INT4_UNROTATED:
        unrotate(engine)
    started = time.monotonic()
    logprobs = [value for ids in windows for value in score(engine, ids)]
    return {
        "perplexity": math.exp(-sum(logprobs) / len(logprobs)),
        "kv_bytes_per_token": engine.plan.block_bytes // engine.plan.block_size,
        "seconds": round(time.monotonic() - started, 1),
    }


def unrotate(engine: Engine) -> None:
    """Swap the engine's cache for one of plain 4-bit codes."""
    model = engine.runner.model.config
    shape = (engine.plan.num_blocks, model.num_layers, *model.kv_shape[:2], engine.plan.block_size, model.kv_shape[2])
    engine.runner.kv_cache = QuantizedKVCache(
        shape, (CodeFormat(4), CodeFormat(4)), lambda part, dtype: torch.zeros(part, dtype=dtype)
    )


def score(engine: Engine, ids: list[int]) -> list[float]:
    """Log-probability of every token of a window but its first."""
    engine.add(Request("window", ids, SamplingParams(max_new_tokens=0, prompt_logprobs=True)))
    while engine.has_work:
        for output in engine.step():
            if output.prompt_logprobs is not None:
                return [next(iter(values.values())) for values in output.prompt_logprobs]
    raise SystemExit("the engine scored nothing")


if __name__ == "__main__":
    main()
