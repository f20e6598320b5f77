"""Grids and rounding: what is stored is what is read, and a search never does worse than what it starts from."""

from __future__ import annotations

import pytest
import torch

from lmdeploy.errors import CheckpointError
from lmdeploy.lite.gptq import factors, gptq_round
from lmdeploy.lite.grids import Grid, GridSpec, clipped_grid, plain_grid
from lmdeploy.lite.scaling import output_error
from lmdeploy.quantization.export import awq_tensors
from lmdeploy.quantization.integer_formats import read_awq

SPEC = GridSpec(4, 32)


def random_weight(rows: int = 24, columns: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


def correlated_moment(columns: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(1024, columns, generator=generator) @ (mixing + 0.5)
    return x.t() @ x


def test_plain_grid_errs_at_most_half_a_step() -> None:
    weight = random_weight()
    grid = plain_grid(weight, SPEC)
    error = (grid.values(grid.round(weight)) - weight).abs().unflatten(-1, (-1, 32))
    # The zero point is a whole number, so an end of the range may be cut by half a step more.
    assert (error <= 1.01 * grid.scale[..., None]).all()
    assert (error <= 0.501 * grid.scale[..., None]).float().mean() > 0.95


def test_zero_is_a_value_even_where_all_weights_are_positive() -> None:
    grid = plain_grid(torch.rand(4, 64) + 1, SPEC)
    assert torch.equal(grid.zero, torch.zeros_like(grid.zero))
    assert (grid.values(grid.round(torch.full((4, 64), 1.5))) - 1.5).abs().max() < 0.1


def test_symmetric_grid_keeps_its_zero_in_the_middle() -> None:
    grid = plain_grid(random_weight(), GridSpec(4, 32, symmetric=True))
    assert torch.equal(grid.zero, torch.full_like(grid.zero, 8))


def test_clipping_never_errs_more_than_the_whole_range() -> None:
    weight, importance = random_weight(), torch.rand(128) + 0.1
    plain, clipped = plain_grid(weight, SPEC), clipped_grid(weight, importance, SPEC)
    errors = [((g.values(g.round(weight)) - weight).square() * importance).sum() for g in (plain, clipped)]
    assert errors[1] < errors[0]


def test_gptq_errs_less_than_rounding_where_inputs_are_correlated() -> None:
    weight, moment = random_weight(), correlated_moment()
    grid = plain_grid(weight, SPEC)
    nearest = output_error(grid.values(grid.round(weight)) - weight, moment)
    assert output_error(grid.values(gptq_round(weight, moment, grid)) - weight, moment) < 0.6 * nearest


def test_gptq_is_rounding_where_inputs_are_independent() -> None:
    weight = random_weight()
    grid = plain_grid(weight, SPEC)
    assert torch.equal(gptq_round(weight, torch.eye(128), grid), grid.round(weight))


def test_factors_of_moments_of_every_kind() -> None:
    lower, upper = factors(correlated_moment())
    torch.testing.assert_close(upper.t() @ upper @ (lower @ lower.t()), torch.eye(128), atol=1e-2, rtol=0)
    for moment in (torch.zeros(64, 64), torch.full((64, 64), 1e30)):  # of no token, and of one that repeats
        assert all(torch.isfinite(factor).all() for factor in factors(moment))
    for value in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match="NaN, infinite"):
            factors(torch.full((4, 4), value))


def test_stored_tensors_are_the_values_that_codes_were_chosen_for() -> None:
    weight = random_weight()
    grid: Grid = clipped_grid(weight, torch.ones(128), SPEC)
    codes = grid.round(weight)
    tensors = awq_tensors("x", grid.to_affine(codes))
    read = read_awq(tensors["x.qweight"], tensors["x.qzeros"], tensors["x.scales"])
    assert torch.equal(read.dequantize(torch.float32), grid.values(codes))
