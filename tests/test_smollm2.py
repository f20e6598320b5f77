"""The built-in model against transformers' answers on the same weights (tests/data/make_reference.py)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lmdeploy import GenerationConfig, Pipeline, TurbomindEngineConfig, pipeline

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
