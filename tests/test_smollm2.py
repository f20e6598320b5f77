"""The built-in model against transformers' answers on the same weights (tests/data/make_reference.py)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdeploy import GenerationConfig, Pipeline, TurbomindEngineConfig, pipeline
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.engine.request import Request, SamplingParams

DATA = Path(__file__).parent / "data"
REFERENCE: dict[str, Any] = json.loads((DATA / "smollm2_reference.json").read_text(encoding="utf-8"))


def open_pipeline(model: Path, dtype: str) -> Pipeline:
    return pipeline(str(model), backend_config=TurbomindEngineConfig(dtype=dtype, session_len=1024))


def text_perplexity(pipe: Pipeline) -> float:
    ids = pipe.tokenizer.encode((DATA / "harbour.txt").read_text(encoding="utf-8"))
    size = REFERENCE["window"]
    windows = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    losses = pipe.get_ppl(windows)
    return math.exp(sum(losses) / len(losses))


def test_tokenizer_gives_the_reference_ids(builtin_model: Path) -> None:
    from lmdeploy import Tokenizer

    tokenizer = Tokenizer(builtin_model)
    for answer in REFERENCE["answers"]:
        assert tokenizer.encode(answer["prompt"]) == answer["prompt_ids"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.005)])
def test_perplexity(builtin_model: Path, dtype: str, tolerance: float) -> None:
    with open_pipeline(builtin_model, dtype) as pipe:
        assert text_perplexity(pipe) == pytest.approx(REFERENCE["perplexity"], rel=tolerance)


def test_greedy_text_equals_transformers(builtin_model: Path) -> None:
    answers = REFERENCE["answers"]
    config = GenerationConfig(max_new_tokens=64, ignore_eos=True)
    with open_pipeline(builtin_model, "float32") as pipe:
        responses = pipe([answer["prompt"] for answer in answers], gen_config=config, do_preprocess=False)
    for response, answer in zip(responses, answers, strict=True):
        assert response.token_ids == answer["greedy"]
        assert response.text == answer["text"]


def answers_and_logits(model: Path, dtype: str) -> list[tuple[list[int], torch.Tensor]]:
    """Of each prompt the greedy answer, and the logits [64, V] along the reference's answer."""
    engine = Engine(model, EngineConfig(dtype=dtype, session_len=1024, max_batch_size=16, cache_max_entry_count=200))
    tokens: dict[str, list[int]] = {}
    logits: dict[str, list[torch.Tensor]] = {}
    for number, answer in enumerate(REFERENCE["answers"]):
        path = answer["prompt_ids"] + answer["greedy"][:-1]
        engine.add(Request(f"answer {number}", answer["prompt_ids"], SamplingParams(max_new_tokens=64)))
        engine.add(Request(f"path {number}", path, SamplingParams(max_new_tokens=1, return_logits="all")))
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.logits is not None:
                logits.setdefault(output.request_id, []).append(output.logits.float().cpu())
    engine.close()
    numbers = range(len(REFERENCE["answers"]))
    return [(tokens[f"answer {number}"], torch.cat(logits[f"path {number}"])[-64:]) for number in numbers]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_on_a_gpu_follow_float32(builtin_model: Path, dtype: str) -> None:
    """Along the reference's answers the logits are near, and an answer leaves the reference only where two tokens tie."""
    exact, near = (answers_and_logits(builtin_model, name) for name in ("float32", dtype))
    for answer, (own, theirs), (ours, nearly) in zip(REFERENCE["answers"], exact, near, strict=True):
        assert own == answer["greedy"]
        bound = float((nearly - theirs).abs().max())
        assert bound < 3e-2 * float(theirs.abs().max())
        first = next((at for at, pair in enumerate(zip(ours, own, strict=True)) if pair[0] != pair[1]), None)
        if first is not None:
            best = theirs[first].topk(2).values
            assert float(best[0] - best[1]) < 2 * bound
