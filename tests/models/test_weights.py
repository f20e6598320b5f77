"""Each rule of a weight map on names and on values, dense and quantized alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lmdeploy.models.config import ModelConfig
from lmdeploy.models.weight_rules import ExpertRows, Experts, Rows, Split, Transform, grouped_qkv, halves_from_pairs
from lmdeploy.models.weights import Piece, Rename, Skip, Stack, Value, WeightMap, dense
from lmdeploy.quantization.packing import AffineTensor
from tests.quantization.affine_data import random_affine

CONFIG = cast(ModelConfig, SimpleNamespace(num_heads=6, num_kv_heads=2, head_dim=4, moe=SimpleNamespace(num_experts=3)))


def pieces(name: str, *rules: Any) -> list[Piece]:
    return WeightMap(*rules).pieces(name, CONFIG)


def targets(name: str, *rules: Any) -> list[tuple[str, int | None]]:
    return [(piece.name, piece.part) for piece in pieces(name, *rules)]


def both_kinds(rows: int, columns: int = 32) -> list[tuple[Value, torch.Tensor]]:
    """A dense matrix, a bias and a quantized matrix of that many rows, each with its dense values."""
    quantized = random_affine(rows, columns, 16, 4)
    matrix, bias = torch.randn(rows, columns), torch.randn(rows)
    return [(matrix, matrix), (bias, bias), (quantized, quantized.dequantize(torch.float32))]


def test_rules_run_in_order_on_what_the_former_left() -> None:
    rules = (
        Rename(r"^transformer\.h\.", "layers."),
        Rename(r"^layers\.(\d+)\.ln_1", r"layers.\1.norm"),
        Skip(r"\.norm\.bias$"),
    )
    assert targets("transformer.h.11.ln_1.weight", *rules) == [("layers.11.norm.weight", None)]
    assert targets("transformer.h.11.ln_1.bias", *rules) == []
    assert targets("wte.weight", *rules) == [("wte.weight", None)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.attn.q.weight", ("layers.0.attn.qkv.weight", 0)),
        ("layers.0.attn.v.bias", ("layers.0.attn.qkv.bias", 2)),
        ("attn.k.weight", ("attn.qkv.weight", 1)),
        ("layers.0.xattn.q.weight", ("layers.0.xattn.q.weight", None)),
        ("layers.0.attn.q.lora.weight", ("layers.0.attn.q.lora.weight", None)),
        ("layers.0.attn.q_norm.weight", ("layers.0.attn.q_norm.weight", None)),
    ],
)
def test_stack_matches_whole_names(name: str, expected: tuple[str, int | None]) -> None:
    assert targets(name, Stack("attn.qkv", ("attn.q", "attn.k", "attn.v"))) == [expected]


def test_rows_reorders_weights_biases_and_quantized_weights() -> None:
    (piece,) = pieces("layers.0.attn.weight", Rows(r"attn\.", lambda config, n: torch.arange(n).flip(0)))
    for value, expected in both_kinds(8):
        result = piece.value(value)
        assert isinstance(result, AffineTensor) == isinstance(value, AffineTensor)
        assert torch.equal(dense(result), expected.flip(0))
    assert not piece.is_dense
    (other,) = pieces("layers.0.mlp.weight", Rows(r"attn\.", grouped_qkv))
    assert other.steps == ()


def test_grouped_qkv_is_the_documented_order() -> None:
    """Rows are [Hkv, H / Hkv + 2, D]: 3 query heads, a key and a value for each of the 2 KV heads."""
    stored = ["q0", "q1", "q2", "k0", "v0", "q3", "q4", "q5", "k1", "v1"]
    wanted = ["q0", "q1", "q2", "q3", "q4", "q5", "k0", "k1", "v0", "v1"]
    order = grouped_qkv(CONFIG, 40)
    assert [stored[i] for i in (order[::4] // 4).tolist()] == wanted
    assert torch.equal(order.view(-1, 4) - order.view(-1, 4)[:, :1], torch.arange(4).expand(10, 4))


def test_halves_from_pairs_undoes_the_pairing() -> None:
    heads = torch.arange(2 * 4)  # D = 4: rotation by halves pairs (0, 2) and (1, 3)
    paired = heads.view(2, 2, 2).transpose(1, 2).flatten()
    assert paired.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(paired[halves_from_pairs(CONFIG, 8)], heads)


def test_split_cuts_consecutive_rows() -> None:
    rule = Split(r"\.kv\.", (".key.", ".value."), lambda config: (config.head_dim, 2 * config.head_dim))
    result = pieces("layers.1.kv.weight", rule)
    assert [piece.name for piece in result] == ["layers.1.key.weight", "layers.1.value.weight"]
    for value, expected in both_kinds(12):
        assert torch.equal(dense(result[0].value(value)), expected[:4])
        assert torch.equal(dense(result[1].value(value)), expected[4:])


def test_transform_makes_values_dense() -> None:
    (piece,) = pieces(
        "lm_head.weight", Transform(r"^lm_head\.", lambda value, config: value / value.norm(dim=-1, keepdim=True))
    )
    assert piece.is_dense
    matrix, _, quantized = both_kinds(5)
    for value, expected in (matrix, quantized):
        result = piece.value(value)
        assert isinstance(result, torch.Tensor)
        assert torch.equal(result, expected / expected.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.mlp.experts.0.gate_proj.weight", ("layers.0.mlp.gate_up_proj.weight", 0)),
        ("layers.0.mlp.experts.7.up_proj.weight", ("layers.0.mlp.gate_up_proj.weight", 15)),
        ("layers.0.mlp.experts.12.down_proj.bias", ("layers.0.mlp.down_proj.bias", 12)),
        ("layers.0.mlp.shared_experts.gate_proj.weight", ("layers.0.mlp.shared_experts.gate_proj.weight", None)),
        ("layers.0.mlp.gate.weight", ("layers.0.mlp.gate.weight", None)),
        ("layers.0.other.experts.0.gate_proj.weight", ("layers.0.other.experts.0.gate_proj.weight", None)),
    ],
)
def test_experts(name: str, expected: tuple[str, int | None]) -> None:
    assert targets(name, Experts(r"mlp\.experts", "mlp")) == [expected]


def test_experts_of_another_dialect() -> None:
    rule = Experts(r"block_sparse_moe\.experts", "mlp", gate="w1", up="w3", down="w2")
    names = [f"layers.3.block_sparse_moe.experts.2.{w}.weight" for w in ("w1", "w2", "w3")]
    assert [targets(name, rule) for name in names] == [
        [("layers.3.mlp.gate_up_proj.weight", 4)],
        [("layers.3.mlp.down_proj.weight", 2)],
        [("layers.3.mlp.gate_up_proj.weight", 5)],
    ]


def test_expert_rows_of_flat_and_of_stacked_tensors() -> None:
    rule = ExpertRows(r"experts\.mlp\.v1$", "gate_up_proj.weight", slot=1, slots=2)
    result = pieces("ffn.experts.mlp.v1", rule)
    assert [(piece.name, piece.part) for piece in result] == [("ffn.gate_up_proj.weight", part) for part in (1, 3, 5)]
    for value, expected in both_kinds(3 * 4):
        for expert, piece in enumerate(result):
            assert torch.equal(dense(piece.value(value)), expected[4 * expert : 4 * expert + 4])
    stacked = torch.randn(3, 4, 32)
    assert torch.equal(dense(result[2].value(stacked)), stacked[2])
    quantized = random_affine(12, 32, 16, 4)
    cube = AffineTensor(*(t.unflatten(0, (3, 4)) for t in (quantized.q, quantized.scales, quantized.mins)), 4)
    assert torch.equal(dense(result[1].value(cube)), quantized.dequantize(torch.float32)[4:8])


def test_steps_add_up() -> None:
    """The rows of a split are reordered after the cut, as the rules say."""
    rules = (
        Split(r"\.both\.", (".a.", ".b."), lambda config: (2, 3)),
        Rows(r"\.b\.", lambda config, n: torch.arange(n).flip(0)),
    )
    first, second = pieces("x.both.weight", *rules)
    value = torch.arange(5.0)
    assert dense(first.value(value)).tolist() == [0, 1]
    assert dense(second.value(value)).tolist() == [4, 3, 2]
