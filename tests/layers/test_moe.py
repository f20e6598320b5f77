"""Routing and routed experts against their definitions, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmdeploy import kernels
from lmdeploy.layers.moe import Router, choose_experts
from lmdeploy.models.loader import load_model
from lmdeploy.models.moe_config import MoEConfig
from tests.models.golden_data import make_checkpoint

TOKENS, EXPERTS, HIDDEN, INNER = 5, 8, 12, 6


def config(**changes: object) -> MoEConfig:
    return MoEConfig(num_experts=EXPERTS, experts_per_token=3, intermediate_size=INNER, layers=(True,), **changes)  # type: ignore[arg-type]


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1))


def test_softmax_over_all_experts(logits: Tensor) -> None:
    weights, experts = choose_experts(logits, None, config())
    scores = torch.softmax(logits, -1)
    assert torch.equal(experts, scores.topk(3).indices)
    torch.testing.assert_close(weights, scores.topk(3).values)
    normalized, _ = choose_experts(logits, None, config(norm_power=1.0, scaling=2.5))
    torch.testing.assert_close(normalized, 2.5 * weights / weights.sum(-1, keepdim=True))
    squared, _ = choose_experts(logits, None, config(norm_power=2.0))
    torch.testing.assert_close(squared.square().sum(-1), torch.ones(TOKENS))


def test_softmax_over_the_chosen_experts(logits: Tensor) -> None:
    weights, experts = choose_experts(logits, None, config(scoring="topk_softmax"))
    torch.testing.assert_close(weights, torch.softmax(logits.gather(1, experts), -1))


def test_bias_decides_the_choice_and_not_the_weight(logits: Tensor) -> None:
    bias = torch.zeros(EXPERTS)
    bias[2] = 100.0
    weights, experts = choose_experts(logits, bias, config(scoring="sigmoid", score_bias=True))
    assert (experts[:, 0] == 2).all()
    torch.testing.assert_close(weights, torch.sigmoid(logits).gather(1, experts))


@pytest.mark.parametrize("kind", ["max", "top2"])
def test_only_the_best_groups_are_chosen_from(logits: Tensor, kind: str) -> None:
    _, experts = choose_experts(logits, None, config(group_score=kind, num_groups=4, top_groups=2))
    for row, chosen in zip(torch.softmax(logits, -1), experts, strict=True):
        groups = row.view(4, 2)
        rating = groups.max(-1).values if kind == "max" else groups.sum(-1)
        allowed = set(rating.topk(2).indices.tolist())
        best = sorted((e for e in range(EXPERTS) if e // 2 in allowed), key=lambda e: -float(row[e]))[:3]
        assert chosen.tolist() == best


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_routed_mlp_is_the_weighted_sum_of_experts(logits: Tensor, clamp: float | None) -> None:
    generator = torch.Generator().manual_seed(2)
    x, gate_up, down, gate_up_bias, down_bias = (
        torch.randn(*shape, generator=generator)
        for shape in (
            (TOKENS, HIDDEN),
            (EXPERTS, 2 * INNER, HIDDEN),
            (EXPERTS, HIDDEN, INNER),
            (EXPERTS, 2 * INNER),
            (EXPERTS, HIDDEN),
        )
    )
    weights, experts = choose_experts(logits, None, config())
    out = kernels.routed_mlp(x, weights, experts, gate_up, down, "silu", gate_up_bias, down_bias, clamp)
    for token in range(TOKENS):
        expected = torch.zeros(HIDDEN)
        for weight, expert in zip(weights[token], experts[token], strict=True):
            gate, up = (gate_up[expert] @ x[token] + gate_up_bias[expert]).chunk(2)
            if clamp is None:
                hidden = gate * torch.sigmoid(gate) * up
            else:
                gate, up = gate.clamp(max=clamp), up.clamp(-clamp, clamp)
                hidden = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            expected += weight * (down[expert] @ hidden + down_bias[expert])
        torch.testing.assert_close(out[token], expected, rtol=1e-4, atol=1e-4)


def test_a_router_keeps_its_float32_parameters_in_a_bfloat16_model(tmp_path: Path) -> None:
    """Biases that differ by less than bfloat16 can tell decide between experts."""
    file = make_checkpoint("deepseek_v3/base", tmp_path) / "model.safetensors"
    stored = load_file(file)
    biases = {
        name: tensor.float() + 2**-12 for name, tensor in stored.items() if name.endswith("e_score_correction_bias")
    }
    save_file({**stored, **biases}, file)
    model = load_model(tmp_path, dtype="bfloat16")
    routers = [module for module in model.modules() if isinstance(module, Router)]
    assert len(routers) == len(biases) > 0
    assert model.dtype == torch.bfloat16
    for router, bias in zip(routers, biases.values(), strict=True):
        assert router.score_bias is not None
        assert (router.weight.dtype, router.score_bias.dtype) == (torch.float32, torch.float32)
        assert torch.equal(router.score_bias, bias)
        assert not torch.equal(bias.bfloat16().float(), bias)
