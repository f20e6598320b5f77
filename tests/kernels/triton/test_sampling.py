"""The largest logit, draws from filtered distributions against their definition in float64, uniform numbers, bit masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmdeploy.kernels.reference import sampling as reference
from lmdeploy.kernels.triton import sampling
from tests.kernels.triton.conftest import IS_INTERPRETED
from tests.kernels.triton.numbers import DTYPES, normal

NAN, INF = float("nan"), float("inf")

# temperature, top_k, top_p, min_p
SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 0.8, 0.0),
    (1.5, 0, 0.999, 0.0),
    (1.0, 40, 1.0, 0.0),
    (0.9, 40, 0.8, 0.0),
    (1.2, 0, 1.0, 0.1),
    (1.2, 30, 0.9, 0.05),
    (1.0, 10**6, 0.5, 0.0),
]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short row has several tiles and blocks."""
    for name, size in (("_TILE", 256), ("_BLOCK", 64), ("_SCAN_BLOCK", 128), ("_ARGMAX_BLOCK", 128)):
        monkeypatch.setattr(sampling, name, size)


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Unnormalized probabilities [V] in float64; of ties at top_p the first stay."""
    scaled = logits.double() / max(temperature, 1e-4)
    if 0 < top_k < len(scaled):
        scaled = scaled.where(scaled >= scaled.topk(top_k).values[-1], -INF)
    probabilities = scaled.softmax(-1)
    probabilities = probabilities.where(probabilities >= min_p * probabilities.max(), 0.0)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        is_kept = ordered.cumsum(0) - ordered < top_p * ordered.sum()
        probabilities = torch.zeros_like(ordered).scatter_(0, order, ordered.where(is_kept, 0.0))
    return probabilities


def expected_token(probabilities: Tensor, number: float) -> int:
    running = probabilities.cumsum(0)
    return int(torch.searchsorted(running, number * running[-1:], right=True).clamp(max=len(running) - 1))


def draw_all(logits: Tensor, settings: list[tuple[float, int, float, float]], numbers: Tensor) -> list[int]:
    temperature, top_k, top_p, min_p = (torch.tensor(values) for values in zip(*settings, strict=True))
    floats = (t.float().to(logits.device) for t in (temperature, top_p, min_p))
    temperature, top_p, min_p = floats
    drawn = sampling.draw(logits, temperature, top_k.to(logits.device), top_p, min_p, numbers.to(logits.device))
    return drawn.tolist()


def check_against_definition(logits: Tensor, settings: list[tuple[float, int, float, float]], seed: int = 0) -> None:
    numbers = torch.rand(len(logits), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = logits.cpu()
    probabilities = [distribution(row, *s) for row, s in zip(rows, settings, strict=True)]
    expected = [expected_token(p, u) for p, u in zip(probabilities, numbers.tolist(), strict=True)]
    assert draw_all(logits, settings, numbers) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [1, 528])
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 1), (1, 5000), (3, 700)])
def test_argmax(
    rows: int, vocab_size: int, programs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(sampling, "_PROGRAMS", programs)
    logits = normal(rows, vocab_size + 9, seed=rows, device=device, dtype=dtype)[:, :vocab_size]
    assert torch.equal(sampling.argmax(logits).cpu(), logits.cpu().float().argmax(-1))


@pytest.mark.parametrize("vocab_size", [10, 5000])
def test_argmax_of_ties_and_of_rows_without_a_largest(vocab_size: int, device: torch.device) -> None:
    logits = normal(7, vocab_size, seed=0, device=device)
    logits[0, [4, vocab_size - 1]] = 50.0
    logits[1, 3] = NAN
    logits[2, vocab_size - 1] = INF
    logits[3] = -INF
    logits[4] = -INF
    logits[4, vocab_size - 2] = -300.0
    logits[5] = NAN
    logits[6] = -0.0
    logits[6, 1:] = 0.0
    for _ in range(2):  # the counters are left as they were found
        assert sampling.argmax(logits).tolist() == [4, -1, -1, -1, vocab_size - 2, -1, 0]
    settings = [(1.0, 5, 0.9, 0.0), (0.0, 0, 1.0, 0.0)]
    for setting in settings:
        tokens = draw_all(logits, 7 * [setting], torch.zeros(7))
        assert [t for row, t in enumerate(tokens) if row in (1, 2, 3, 5)] == 4 * [-1]
        assert tokens[4] == vocab_size - 2


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
def test_draws(spread: float, device: torch.device) -> None:
    check_against_definition(spread * normal(len(SETTINGS), 700, seed=1, device=device), SETTINGS)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_from_many_ties(dtype: torch.dtype, device: torch.device) -> None:
    logits = (2 * normal(len(SETTINGS), 600, seed=2, device=device)).round().div(2).to(dtype)
    check_against_definition(logits, SETTINGS, seed=1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("flat", [False, True])
def test_more_candidates_than_the_list_holds(flat: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(sampling, "_LIST_CAPACITY", 16)
    logits = torch.zeros(3, 301, device=device) if flat else 0.1 * normal(3, 301, seed=3, device=device)
    check_against_definition(logits, [(1.0, 100, 0.7, 0.0), (0.8, 0, 0.5, 0.0), (1.0, 120, 1.0, 0.0)])


def test_one_tile_of_full_size(device: torch.device) -> None:
    check_against_definition(3 * normal(2, 5000, seed=4, device=device), [(0.8, 50, 0.95, 0.0), (1.0, 0, 0.9, 0.0)])


@pytest.mark.skipif(IS_INTERPRETED, reason="slow through the interpreter")
@pytest.mark.parametrize(
    ("vocab_size", "spread", "dtype"),
    [(92544, 1.0, torch.float32), (151936, 4.0, torch.bfloat16), (2000, 0.01, torch.float32)],
)
def test_whole_vocabularies(vocab_size: int, spread: float, dtype: torch.dtype, device: torch.device) -> None:
    """The same tokens every time, and those of the definition, but for numbers at the border of two tokens."""
    settings = [
        (t, k, p, m) for t in (0.7, 1.0) for k in (0, 1, 50, 3000) for p in (0.3, 0.95, 1.0) for m in (0.0, 0.02)
    ]
    logits = (spread * normal(len(settings), vocab_size, seed=6, device=device)).to(dtype)
    assert sampling.argmax(logits).tolist() == logits.cpu().float().argmax(-1).tolist()
    numbers = torch.rand(len(settings), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    drawn = draw_all(logits, settings, numbers)
    assert draw_all(logits, settings, numbers) == drawn
    rows = zip(logits, settings, numbers.tolist(), drawn, strict=True)
    wrong = sum(expected_token(distribution(row, *s), number) != token for row, s, number, token in rows)
    assert wrong <= len(settings) // 16


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "setting", [(1.0, 1, 1.0, 0.0), (1.0, 0, 1e-6, 0.0), (1.0, 0, 1.0, 1.0), (1e-6, 0, 1.0, 0.0), (0.0, 7, 0.9, 0.0)]
)
def test_settings_that_leave_the_largest_only(setting: tuple[float, int, float, float], device: torch.device) -> None:
    logits = normal(4, 300, seed=5, device=device)
    numbers = torch.tensor([0.0, 0.3, 0.6, 1 - 2**-53], dtype=torch.float64)
    assert draw_all(logits, 4 * [setting], numbers) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("number_type", [torch.float32, torch.float64])
def test_the_ends_of_the_distribution(number_type: torch.dtype, device: torch.device) -> None:
    """Banned tokens and tokens of no weight are never drawn, not even by the numbers next to 0 and 1."""
    logits = torch.full((2, 300), -INF, device=device)
    logits[:, 40:200] = 0.0
    logits[:, 199] = -40.0
    numbers = torch.tensor([0.0, 1 - 2**-24], dtype=number_type)
    assert draw_all(logits, 2 * [(1.0, 0, 1.0, 0.0)], numbers) == [40, 198]
    assert draw_all(logits, 2 * [(1.0, 100, 0.5, 0.0)], numbers)[0] == 40


@pytest.mark.usefixtures("small_blocks")
def test_tokens_come_as_often_as_they_are_probable(device: torch.device) -> None:
    """Chi-square of draws with fixed seeds; the bound is passed by chance once in a thousand."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.0], device=device)
    setting, draws = (1.0, 0, 1.0, 0.1), 150
    numbers = sampling.uniforms(torch.arange(draws, device=device), torch.full((draws,), 7, device=device))
    tokens = draw_all(logits.expand(draws, 8), draws * [setting], numbers)
    probabilities = distribution(logits.cpu(), *setting)
    wanted = draws * probabilities / probabilities.sum()
    counts = torch.bincount(torch.tensor(tokens), minlength=8).double()
    is_possible = wanted > 0
    assert not counts[~is_possible].any()
    assert int(is_possible.sum()) == 6
    assert ((counts - wanted).square() / wanted)[is_possible].sum() < 20.5  # 5 degrees of freedom


def test_uniforms_are_the_engine_s(device: torch.device) -> None:
    from lmdeploy.engine.drawing import uniform

    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(-(2**63), 2**63 - 1, (200,), generator=generator)
    seeds[:3] = torch.tensor([0, 1, 2**63 - 1])
    positions = torch.randint(0, 10**6, (200,), generator=generator)
    expected = [uniform(s, p) for s, p in zip(seeds.tolist(), positions.tolist(), strict=True)]
    assert sampling.uniforms(seeds.to(device), positions.to(device)).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [31, 64, 1500])
def test_bitmask(vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Masks of three of five rows, in an order of their own."""
    logits = normal(5, vocab_size + 3, seed=0, device=device, dtype=dtype)[:, :vocab_size]
    allowed = torch.rand(3, vocab_size, generator=torch.Generator().manual_seed(1)) < 0.5
    padded = torch.zeros(3, -(-vocab_size // 32) * 32, dtype=torch.int64)
    padded[:, :vocab_size] = allowed
    words = (padded.unflatten(1, (-1, 32)) << torch.arange(32)).sum(-1)
    mask = words.to(torch.uint32).view(torch.int32).to(device)
    rows = torch.tensor([4, 0, 2], device=device)
    twin, expected = logits.clone(), logits.clone()
    expected[rows] = logits[rows].where(allowed.to(device), -INF)
    sampling.apply_bitmask(logits, mask, rows)
    assert torch.equal(logits, expected)
    reference.apply_bitmask(twin, mask, rows)
    assert torch.equal(twin, expected)
