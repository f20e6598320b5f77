"""Weights that are moved side by side: the same objects with the same values, in few pieces of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmdeploy.engine import compact
from lmdeploy.kernels.reference import affine as reference
from lmdeploy.layers.linear import Linear
from lmdeploy.models.loader import load_model
from lmdeploy.quantization import affine
from tests.engine.driver import greedy, make_engine, run
from tests.tiny_model import make_tiny_llama

AWQ = {
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
}


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "_SMALL", 0)
    monkeypatch.setattr(compact, "_AT_A_TIME", 100_000)


def test_an_engine_answers_as_before_and_its_weights_take_few_pieces(tiny_llama: Path) -> None:
    engine = make_engine(tiny_llama)
    expected = run(engine, [greedy("a", [5, 9, 13])])["a"].token_ids
    model = engine.runner.model
    before = {name: (id(weight), weight.clone()) for name, weight in model.named_parameters()}
    compact.close_gaps(model)
    assert run(engine, [greedy("b", [5, 9, 13])])["b"].token_ids == expected
    for name, weight in model.named_parameters():
        assert id(weight) == before[name][0]
        assert torch.equal(weight, before[name][1]), name
    total = sum(weight.nbytes for weight in model.parameters())
    pieces = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    assert len(pieces) <= -(-total // 100_000) < len(before)


def test_packed_weights_are_moved_and_those_that_share_memory_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affine, "choose_kernels", lambda *arguments: reference)
    folder = make_tiny_llama(tmp_path, hidden_size=128, intermediate_size=256)
    model = load_model(folder, load_format="dummy", dtype="bfloat16", hf_overrides=AWQ)
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    packed = [linear.method.packed for linear in linears if isinstance(linear.method, affine.AffineMethod)]
    shared = model.norm.weight.data
    model.register_buffer("view", shared.view(2, -1))
    places, expected = [w.q.data_ptr() for w in packed], [w.q.clone() for w in packed]
    compact.close_gaps(model)
    assert len(packed) == 8
    assert all(w.q.data_ptr() != place for w, place in zip(packed, places, strict=True))
    assert all(torch.equal(w.q, q) for w, q in zip(packed, expected, strict=True))
    assert model.norm.weight.data_ptr() == shared.data_ptr() == model.view.data_ptr()


def test_weights_stay_where_there_is_no_room_to_move_them(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny_llama, dtype="float32")
    places = {weight: weight.data_ptr() for weight in model.parameters()}
    values = {weight: weight.clone() for weight in places}
    empty, calls = torch.empty, []

    def fail_first(*size: int, **kind: object) -> torch.Tensor:
        calls.append(size)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no memory")
        return empty(*size, **kind)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", fail_first)
    compact.close_gaps(model)
    stayed = [weight for weight, place in places.items() if weight.data_ptr() == place]
    assert 0 < len(stayed) < len(places)
    assert sum(weight.nbytes for weight in stayed) < 2 * 100_000 + max(weight.nbytes for weight in stayed)
    assert all(torch.equal(weight, value) for weight, value in values.items())
