"""With `deterministic`, an answer's logits are the same bits whatever else is computed at the same time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.engine.request import Request, SamplingParams
from lmdeploy.errors import ConfigError
from lmdeploy.kernels import invariant
from tests.tiny_model import make_tiny_llama

ANSWER = 36
LENGTHS = (1, 3, 15, 16, 17, 33, 48, 70, 96)


@pytest.fixture(scope="module", autouse=True)
def off_again() -> Iterator[None]:
    """An engine turns it on for its process, and other modules' tests run in this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(invariant, "_is_on", invariant._is_on)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("deterministic"))


def make_engine(folder: Path, **settings: object) -> Engine:
    return Engine(
        folder,
        EngineConfig(
            deterministic=True, device="auto" if torch.cuda.is_available() else "cpu", session_len=256, block_size=16,
            **{"cache_max_entry_count": 2000, "max_batch_size": 64, **settings},  # type: ignore[arg-type]
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    engine = make_engine(folder, max_prefill_token_num=64)
    yield engine
    engine.close()


def requests(count: int) -> list[Request]:
    generator = random.Random(7)
    made = []
    for number in range(count):
        prompt = [generator.randrange(100) for _ in range(LENGTHS[number % len(LENGTHS)])]
        sampling = SamplingParams(
            max_new_tokens=ANSWER, temperature=0.9 * (number % 2), seed=number, return_logits="generation"
        )
        made.append(Request(str(number), prompt, sampling))
    return made


def answers(engine: Engine, wanted: list[Request], stagger: int = 0) -> dict[str, tuple[list[int], Tensor]]:
    """Tokens and logits of each request; with stagger, so many steps lie between one's arrival and the next one's."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in wanted}
    logits: dict[str, list[Tensor]] = {request.request_id: [] for request in wanted}
    waiting = list(reversed(wanted))
    step = 0
    while waiting or engine.has_work:
        while waiting and (not stagger or step % stagger == 0):
            engine.add(waiting.pop())
            if stagger:
                break
        step += 1
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            if output.logits is not None:
                logits[output.request_id].append(output.logits.cpu())
    return {name: (tokens[name], torch.cat(logits[name])) for name in tokens}


def check_equal(actual: dict[str, tuple[list[int], Tensor]], expected: dict[str, tuple[list[int], Tensor]]) -> None:
    for name, (tokens, logits) in actual.items():
        assert tokens == expected[name][0], name
        assert torch.equal(logits, expected[name][1]), name


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[str, tuple[list[int], Tensor]]:
    return {name: answer for request in requests(64) for name, answer in answers(engine, [request]).items()}


@pytest.mark.parametrize("count", [7, 64])
@pytest.mark.parametrize("stagger", [0, 2])
def test_a_batch_answers_as_each_alone(
    engine: Engine, alone: dict[str, tuple[list[int], Tensor]], count: int, stagger: int
) -> None:
    check_equal(answers(engine, requests(count), stagger), alone)


def test_preempted_requests_and_reused_prefixes_do_too(
    folder: Path, alone: dict[str, tuple[list[int], Tensor]]
) -> None:
    engine = make_engine(
        folder, max_prefill_token_num=64, cache_max_entry_count=12, max_batch_size=8, enable_prefix_caching=True
    )
    try:
        for stagger in (0, 1, 3):
            check_equal(answers(engine, requests(27), stagger), alone)
        assert engine.stats()["num_preemptions"] > 0
        long = next(request for request in requests(9) if len(request.prompt_ids) == 96)
        for _ in range(2):
            engine.add(long)
            outputs = [output for _ in range(60) for output in engine.step()]
        assert outputs[-1].cached_tokens == 64  # a whole piece, not all of its blocks
    finally:
        engine.close()


def test_a_batch_that_is_too_large_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="max_batch_size=257: with deterministic give at most 256"):
        make_engine(folder, max_batch_size=257)
