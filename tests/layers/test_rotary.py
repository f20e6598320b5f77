"""Every rope scaling against its definition, written out position by position in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lmdeploy.layers.context import ForwardContext, KVCache
from lmdeploy.layers.rotary import make_rotary
from lmdeploy.models.rope_config import RopeConfig
from lmdeploy.models.rope_scalings import mscale

DIM = 16
BASE = RopeConfig(kind="default", theta=10000.0, dim=DIM, trained_length=32)
POSITIONS = (0, 1, 7, 31, 32, 33, 100)


def plain(j: int, base: float = 10000.0) -> float:
    return base ** (-2 * j / DIM)


def check_angles(config: RopeConfig, position: int, length: int, frequency: list[float], factor: float = 1.0) -> None:
    cos, sin = make_rotary(config).cos_sin(torch.tensor([position]), torch.tensor([length]))
    assert cos.shape == sin.shape == (1, DIM // 2)
    assert cos.dtype == torch.float32
    expected = [(factor * math.cos(position * f), factor * math.sin(position * f)) for f in frequency]
    torch.testing.assert_close(torch.stack((cos[0], sin[0]), -1), torch.tensor(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("position", POSITIONS)
def test_static_kinds(position: int) -> None:
    plain_frequencies = [plain(j) for j in range(DIM // 2)]
    check_angles(BASE, position, 5, plain_frequencies)
    linear = replace(BASE, kind="linear", factor=4.0)
    check_angles(linear, position, 5, [f / 4 for f in plain_frequencies])


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("prompt_len", [5, 40])
def test_dynamic_follows_the_position_or_the_prompt(position: int, prompt_len: int) -> None:
    config = replace(BASE, kind="dynamic", factor=2.0)
    length = max(prompt_len, position + 1)
    stretch = 2.0 * length / 32 - 1.0 if length > 32 else 1.0
    base = 10000.0 * stretch ** (DIM / (DIM - 2))
    check_angles(config, position, prompt_len, [plain(j, base) for j in range(DIM // 2)])


@pytest.mark.parametrize(
    ("prompt_len", "alpha"), [(5, 1), (32, 1), (33, 3), (64, 3), (65, 7), (96, 7), (128, 7), (129, 15)]
)
def test_dynamic_by_prompt_grows_in_steps(prompt_len: int, alpha: int) -> None:
    config = replace(BASE, kind="dynamic_by_prompt")
    base = 10000.0 * alpha ** (DIM / (DIM - 2))
    check_angles(config, 200, prompt_len, [plain(j, base) for j in range(DIM // 2)])
    assert make_rotary(config).rope_length_key(prompt_len) == (0 if alpha == 1 else alpha)


def test_llama3_keeps_fast_and_divides_slow_frequencies() -> None:
    config = replace(BASE, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    expected = []
    for j in range(DIM // 2):
        wavelength = 2 * math.pi / plain(j)
        if wavelength < 32 / 4:
            expected.append(plain(j))
        elif wavelength > 32 / 1:
            expected.append(plain(j) / 8)
        else:
            smooth = (32 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * plain(j) / 8 + smooth * plain(j))
    assert len({round(f / plain(j), 6) for j, f in enumerate(expected)}) > 2  # all three branches
    check_angles(config, 100, 5, expected)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_ramp(truncate: bool) -> None:
    magnitude = mscale(4.0)
    config = replace(
        BASE, kind="yarn", factor=4.0, beta_fast=3.0, beta_slow=0.3, truncate=truncate, attention_factor=magnitude
    )
    bounds = [DIM * math.log(32 / (turns * 2 * math.pi)) / (2 * math.log(10000.0)) for turns in (3.0, 0.3)]
    low, high = (math.floor(bounds[0]), math.ceil(bounds[1])) if truncate else bounds
    low = max(low, 0)
    expected = []
    for j in range(DIM // 2):
        ramp = min(max((j - low) / (high - low), 0), 1)
        expected.append(plain(j) / 4 * ramp + plain(j) * (1 - ramp))
    assert magnitude == pytest.approx(0.1 * math.log(4) + 1)
    check_angles(config, 100, 5, expected, magnitude)


@pytest.mark.parametrize(("prompt_len", "is_long"), [(5, False), (32, False), (33, True)])
def test_longrope_chooses_divisors_by_prompt(prompt_len: int, is_long: bool) -> None:
    short, long = tuple(1 + 0.1 * j for j in range(8)), tuple(2 + j for j in range(8))
    config = replace(BASE, kind="longrope", short_factor=short, long_factor=long, attention_factor=1.25)
    divisors = long if is_long else short
    check_angles(config, 50, prompt_len, [plain(j) / divisors[j] for j in range(DIM // 2)], 1.25)
    assert make_rotary(config).rope_length_key(prompt_len) == int(is_long)


def test_length_key_is_zero_where_nothing_depends_on_the_length() -> None:
    assert make_rotary(replace(BASE, kind="linear", factor=2.0)).rope_length_key(1000) == 0
    dynamic = make_rotary(replace(BASE, kind="dynamic", factor=2.0))
    assert [dynamic.rope_length_key(n) for n in (1, 32, 33, 90)] == [0, 0, 33, 90]


def context(positions: list[int], query_lens: list[int], prompt_lens: list[int]) -> ForwardContext:
    ends = torch.tensor([0, *query_lens]).cumsum(0)
    last = [positions[int(end) - 1] + 1 for end in ends[1:]]
    return ForwardContext(
        positions=torch.tensor(positions),
        cu_seqlens_q=ends.int(),
        context_lens=torch.tensor(last, dtype=torch.int32),
        block_tables=torch.zeros(len(query_lens), 1, dtype=torch.int32),
        slot_mapping=torch.tensor(positions),
        prompt_lens=torch.tensor(prompt_lens, dtype=torch.int32),
        kv_cache=KVCache(torch.zeros(1, 1, 2, 1, 16, DIM)),
        query_lens=query_lens,
        context_lens_host=last,
    )


@pytest.mark.parametrize("kind", ["default", "dynamic"])
def test_step_tables_equal_the_computed_ones_and_are_made_once(kind: str) -> None:
    rotary = make_rotary(replace(BASE, kind=kind, factor=2.0))
    ctx = context([3, 4, 5, 600, 601], [3, 2], [6, 602])
    cos, sin = rotary.tables(ctx)
    expected = rotary.cos_sin(ctx.positions, torch.tensor([6, 6, 6, 602, 602]))
    torch.testing.assert_close((cos, sin), expected, rtol=0, atol=0)
    assert rotary.tables(ctx)[0] is cos


def test_reserved_table_does_not_move() -> None:
    rotary = make_rotary(BASE)
    rotary.reserve(600, torch.device("cpu"))
    table = rotary._tables
    rotary.tables(context([599], [1], [1]))
    assert table is not None
    assert rotary._tables is table
    rotary.tables(context([5000], [1], [1]))
    assert rotary._tables is not table
