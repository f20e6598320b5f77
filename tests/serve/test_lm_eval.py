"""What evaluation harnesses measure through /v1/completions is what the model says in this process, within 1e-3 nats.

The package lm-eval is asked where it is installed (`pip install lm-eval[api]`; with all that it needs it is too large for
the `dev` extra); its requests and what it reads of the answers are re-enacted in any case.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from lmdeploy.async_engine import AsyncEngine, open_engine
from lmdeploy.messages import GenerationConfig
from tests.serve.live import CONFIG, KEY, running

TOLERANCE_NATS = 1e-3
PAIRS = [
    (row["context"], row["continuation"])
    for row in map(json.loads, (Path(__file__).parent.parent / "data/loglikelihood_pairs.jsonl").open(encoding="utf-8"))
]
Scores = list[tuple[float, bool]]  # log-likelihood of a continuation in nats, whether greedy decoding would give it
HEADERS = {"Authorization": f"Bearer {KEY}"}


@dataclass(frozen=True)
class Case:
    """A server of a model, and what the model says without it."""

    url: str
    engine: AsyncEngine
    expected: Scores


def encode_pair(encode: Callable[[str], list[int]], context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of both, cut as lm-eval cuts them: spaces at the context's end belong to the continuation."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole, first = encode(stripped + continuation), encode(stripped)
    return first, whole[len(first) :]


def scores_in_process(engine: AsyncEngine) -> Scores:
    """From the logits of every position, without log-probabilities of the engine's own."""
    scores = []
    for context, continuation in PAIRS:
        first, rest = encode_pair(encoder(engine), context, continuation)
        config = GenerationConfig(max_new_tokens=0, output_logits="all")
        (response,) = engine.stream([([*first, *rest], config)], is_streaming=False)
        assert response.logits is not None
        logprobs = torch.log_softmax(response.logits.double(), -1)[len(first) - 1 : len(first) + len(rest) - 1]
        chosen = torch.tensor(rest)
        is_greedy = bool((logprobs.argmax(-1) == chosen).all())
        scores.append((logprobs.gather(1, chosen[:, None]).sum().item(), is_greedy))
    return scores


def encoder(engine: AsyncEngine) -> Callable[[str], list[int]]:
    return lambda text: engine.tokenizer.encode(text, add_special_tokens=False)


def check_equal(scores: Scores, expected: Scores) -> None:
    assert len(scores) == len(expected) == len(PAIRS) == 50
    differences = [abs(score[0] - wanted[0]) for score, wanted in zip(scores, expected, strict=True)]
    assert max(differences) < TOLERANCE_NATS
    assert [is_greedy for _, is_greedy in scores] == [is_greedy for _, is_greedy in expected]
    assert len({round(value, 3) for value, _ in expected}) > 40  # they do differ, pair by pair


@pytest.fixture(
    scope="module", params=["tiny", pytest.param("builtin_model", marks=pytest.mark.slow)], ids=["tiny", "built-in"]
)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    model: Path = request.getfixturevalue(request.param)
    engine = open_engine(str(model), CONFIG)
    try:
        expected = scores_in_process(engine)
        with running(model) as (url, service):
            yield Case(url, service.engine, expected)
    finally:
        engine.close()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_requests_of_lm_eval(case: Case, batch_size: int) -> None:
    """Its payload: lists of ids, echo, one token more than it needs, the best token's log-probability beside the chosen."""
    pairs = [encode_pair(encoder(case.engine), *pair) for pair in PAIRS]
    scores: Scores = []
    with httpx2.Client(headers=HEADERS, timeout=60) as client:
        for start in range(0, len(pairs), batch_size):
            batch = pairs[start : start + batch_size]
            payload: dict[str, Any] = {
                "model": "tiny",
                "prompt": [[*first, *rest] for first, rest in batch],
                "temperature": 0,
                "max_tokens": 1,
                "logprobs": 1,
                "seed": 1234,
                "echo": True,
            }
            answer = client.post(f"{case.url}/v1/completions", json=payload)
            assert answer.status_code == 200
            choices = sorted(answer.json()["choices"], key=lambda choice: choice["index"])
            for (first, _), choice in zip(batch, choices, strict=True):
                own = choice["logprobs"]["token_logprobs"][len(first) : -1]
                tops = choice["logprobs"]["top_logprobs"][len(first) : -1]
                scores.append((sum(own), all(a == max(top.values()) for a, top in zip(own, tops, strict=True))))
    check_equal(scores, case.expected)


def test_an_end_token_has_its_score(case: Case) -> None:
    """Harnesses drop the last score as that of the answer, whatever token that is."""
    ids = encoder(case.engine)("The river runs")
    for token in (case.engine.tokenizer.eos_token_id, ids[0]):
        payload = {"model": "tiny", "prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True}
        answer = httpx2.post(
            f"{case.url}/v1/completions", json={**payload, "logit_bias": {str(token): 100}}, headers=HEADERS, timeout=60
        ).json()
        (choice,) = answer["choices"]
        assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1
        assert choice["text"].startswith("The river runs")
        assert answer["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(("batch_size", "num_concurrent"), [(1, 1), (4, 2)])
def test_lm_eval_itself(case: Case, batch_size: int, num_concurrent: int) -> None:
    for name in ("aiohttp", "tenacity"):
        pytest.importorskip(name)
    models = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    model = models.LocalCompletionsAPI(
        base_url=f"{case.url}/v1/completions",
        model="tiny",
        tokenizer_backend="auto",  # finds that this server has a tokenizer for its clients
        auth_token=KEY,
        header=HEADERS,
        batch_size=batch_size,
        num_concurrent=num_concurrent,
        max_retries=1,
    )
    assert model.tokenizer_backend == "remote"
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(PAIRS)]
    check_equal(model.loglikelihood(requests), case.expected)
