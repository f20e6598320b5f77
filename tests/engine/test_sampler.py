"""The sampler against the definitions of its parameters."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lmdeploy.engine.block_manager import root_hash
from lmdeploy.engine.drawing import _keep_top_p, uniform
from lmdeploy.engine.reports import top_logprobs
from lmdeploy.engine.request import Request, SamplingParams
from lmdeploy.engine.sampler import Sampler
from lmdeploy.engine.state import INVALID_TOKEN, RequestState

VOCAB = 12


def make_state(
    name: str = "r", prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **sampling: object
) -> RequestState:
    seed = sampling.pop("seed", 0)
    state = RequestState(
        Request(name, list(prompt), SamplingParams(**sampling)),  # type: ignore[arg-type]
        seed=seed,  # type: ignore[arg-type]
        root=root_hash(),
    )
    state.token_ids.extend(output)
    state.num_computed_tokens = len(state.token_ids)  # the step that samples the next is in flight
    return state


def sample(logits: torch.Tensor, *states: RequestState) -> list[int]:
    sampler = Sampler(VOCAB, torch.device("cpu"))
    return sampler(logits.clone(), list(states)).tolist()


def draw_many(logits: torch.Tensor, count: int = 400, **sampling: object) -> Counter[int]:
    states = [make_state(str(seed), seed=seed, **sampling) for seed in range(count)]
    return Counter(sample(logits.expand(count, -1), *states))


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) * 2


def test_greedy_is_argmax(logits: torch.Tensor) -> None:
    assert sample(logits, make_state()) == [int(logits.argmax())]


def test_draws_follow_the_distribution(logits: torch.Tensor) -> None:
    count = 4000
    frequencies = draw_many(logits, count, temperature=1.5)
    expected = torch.softmax(logits[0] / 1.5, -1)
    chi_square = sum((frequencies[t] - count * p) ** 2 / (count * p) for t, p in enumerate(expected.tolist()))
    assert chi_square < 31.3  # 99.9th percentile with 11 degrees of freedom


@pytest.mark.parametrize("k", [1, 3, 7])
def test_top_k(logits: torch.Tensor, k: int) -> None:
    assert set(draw_many(logits, temperature=3.0, top_k=k)) == set(logits[0].topk(k).indices.tolist())


@pytest.mark.parametrize("top_p", [0.3, 0.8])
def test_top_p(logits: torch.Tensor, top_p: float) -> None:
    probabilities, order = torch.softmax(logits[0], -1).sort(descending=True)
    size = int((probabilities.cumsum(0) < top_p).sum()) + 1
    assert set(draw_many(logits, 2000, temperature=1.0, top_p=top_p)) == set(order[:size].tolist())


def test_min_p(logits: torch.Tensor) -> None:
    probabilities = torch.softmax(logits[0] / 2, -1)
    allowed = set(torch.nonzero(probabilities >= 0.2 * probabilities.max()).flatten().tolist())
    assert set(draw_many(logits, 2000, temperature=2.0, min_p=0.2)) == allowed


def test_a_seeded_request_does_not_see_its_batch(logits: torch.Tensor) -> None:
    other = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    for seed in range(30):
        alone = sample(logits, make_state(seed=seed, temperature=1.0, top_p=0.9))
        neighbours = [make_state(f"n{i}", seed=i, temperature=2.0, top_k=i) for i in range(3)]
        mixed = sample(torch.cat((other, logits)), *neighbours, make_state(seed=seed, temperature=1.0, top_p=0.9))
        assert mixed[3] == alone[0]


def test_uniform_depends_on_seed_and_position_only() -> None:
    numbers = [uniform(seed, position) for seed in range(50) for position in range(50)]
    assert numbers[7] == uniform(0, 7)
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.02


def test_penalties_follow_their_formulas(logits: torch.Tensor) -> None:
    output = (3, 3, 5)
    state = make_state(
        output=output,
        repetition_penalty=1.7,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logprobs=VOCAB,
        temperature=0.0,
    )
    line = logits[0].clone()
    for token in {1, 2, *output}:
        line[token] = line[token] / 1.7 if line[token] > 0 else line[token] * 1.7
    for token in set(output):
        line[token] -= 0.4 + 0.3 * output.count(token)
    for best in line.argsort(descending=True)[:4].tolist():
        assert sample(logits, state) == [best]
        state.request.sampling.logit_bias[best] = float("-inf")


def test_penalties_count_tokens_that_the_host_has_not_seen(logits: torch.Tensor) -> None:
    sampler = Sampler(VOCAB, torch.device("cpu"))
    state = make_state(presence_penalty=50.0)
    seen = []
    for _ in range(VOCAB):
        seen.append(int(sampler(logits.clone(), [state])))
        state.num_computed_tokens += 1
    assert sorted(seen) == list(range(VOCAB))


def test_biases_bad_words_and_minimum_length(logits: torch.Tensor) -> None:
    order = logits[0].argsort(descending=True).tolist()
    assert sample(logits, make_state(bad_token_ids=tuple(order[:3]))) == [order[3]]
    assert sample(logits, make_state(logit_bias={order[5]: 100.0})) == [order[5]]
    assert sample(logits, make_state(stop_token_ids=(order[0],), min_new_tokens=2)) == [order[1]]
    assert sample(logits, make_state(stop_token_ids=(order[0],), min_new_tokens=2, output=(4, 4))) == [order[0]]
    begun = make_state(prompt=(8, 9), bad_token_sequences=((8, 9, order[0]), (7, 9, order[1])))
    assert sample(logits, begun) == [order[1]]


def test_logprobs_are_those_of_the_model(logits: torch.Tensor) -> None:
    token = torch.tensor(sample(logits, make_state(bad_token_ids=(int(logits.argmax()),))))
    ids, values = top_logprobs(logits[0], token[0], 3)
    assert ids[0] == token
    expected = torch.log_softmax(logits[0], -1)
    assert torch.allclose(values, expected[ids])
    assert ids[1:].tolist() == expected.topk(3).indices.tolist()


def test_no_finite_logit_is_reported_and_neighbours_live(logits: torch.Tensor) -> None:
    broken = torch.full((1, VOCAB), float("nan"))
    tokens = sample(torch.cat((broken, logits)), make_state("a"), make_state("b"))
    assert tokens == [INVALID_TOKEN, int(logits.argmax())]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_logit_is_enough(logits: torch.Tensor, temperature: float, bad: float) -> None:
    broken = logits.clone()
    broken[0, 4] = bad
    assert sample(broken, make_state(temperature=temperature)) == [INVALID_TOKEN]


def test_a_neighbours_top_p_cuts_no_tail() -> None:
    """Float sums over a large vocabulary reach 1 before the end; a request without top_p keeps its last tokens."""
    flat = torch.zeros(2, 200_000)
    states = [make_state("a", temperature=1.0, top_p=0.5), make_state("b", temperature=1.0)]
    probabilities = torch.softmax(flat, dim=-1)
    kept = _keep_top_p(probabilities, torch.tensor([[state.request.sampling.top_p] for state in states]))
    assert abs(int((kept[0] > 0).sum()) - 100_000) < 1000
    assert torch.equal(kept[1], probabilities[1])
