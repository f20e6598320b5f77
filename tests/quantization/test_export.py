"""What the writers of quantized tensors produce: read back without loss, and byte for byte what independent writers produce."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.models.checkpoint import open_checkpoint
from lmdeploy.quantization.export import (
    awq_config,
    awq_tensors,
    compressed_tensors,
    compressed_tensors_config,
    gptq_config,
    gptq_tensors,
    smooth_quant_config,
    smooth_quant_tensors,
)
from lmdeploy.quantization.integer_formats import find_group_size, read_awq, read_compressed, read_gptq
from lmdeploy.quantization.packing import AffineTensor
from lmdeploy.quantization.scaled import ScaledTensor
from lmdeploy.quantization.words import AWQ_ORDER, pack_words, unpack_rows, unpack_words
from tests.quantization import exports


def random_weight(
    rows: int, columns: int, group_size: int, bits: int, seed: int, zero: int | None = None
) -> AffineTensor:
    """Every q and integer zero from 0 on, or one zero for all; scales that float16 holds."""
    generator = torch.Generator().manual_seed(seed)
    groups = (rows, columns // group_size)
    q = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 1 << bits, groups, generator=generator) if zero is None else torch.full(groups, zero)
    scales = torch.rand(groups, generator=generator).half().float() + 2.0**-10
    return AffineTensor.from_zeros(q, scales.half().float(), zeros, bits)


def check_same(actual: AffineTensor, expected: AffineTensor) -> None:
    assert actual.bits == expected.bits
    for name in ("q", "scales", "mins"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert (actual.columns is None) == (expected.columns is None)


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.sampled_from([16, 32, 64]), st.integers(0, 1 << 20))


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.sampled_from([4, 8]))
def test_round_trips(shape: tuple[int, int, int, int], bits: int) -> None:
    rows, groups, group_size, seed = shape
    weight = random_weight(8 * rows, groups * group_size, group_size, bits, seed)
    if bits == 4:
        t = awq_tensors("x", weight)
        check_same(read_awq(t["x.qweight"], t["x.qzeros"], t["x.scales"]), weight)
    t = gptq_tensors("x", weight)
    check_same(read_gptq(t["x.qweight"], t["x.qzeros"], t["x.scales"], t["x.g_idx"]), weight)
    t = compressed_tensors("x", weight, torch.float32)
    zeros = t.get("x.weight_zero_point")
    check_same(read_compressed(t["x.weight_packed"], t["x.weight_scale"], zeros, weight.shape[1]), weight)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.sampled_from([2, 4, 8]), st.booleans(), st.integers(0, 1 << 20))
def test_words(count: int, bits: int, in_awq_order: bool, seed: int) -> None:
    order = AWQ_ORDER if in_awq_order and bits == 4 else None
    values = torch.randint(
        0, 1 << bits, (3, count * 32 // bits), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    packed = pack_words(values, bits, order)
    assert torch.equal(packed, exports.words(values.numpy(), bits, order))
    assert torch.equal(unpack_rows(packed.T, bits, order), values.T)
    if order is None:
        assert torch.equal(unpack_words(packed, bits), values)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_same_bytes_as_an_independent_writer(bits: int) -> None:
    source = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    rounded = exports.round_weight(source, bits, np.arange(64) // 32)
    weight = AffineTensor.from_zeros(
        torch.from_numpy(rounded.q.astype(np.uint8)),
        torch.from_numpy(rounded.scale),
        torch.from_numpy(rounded.zero),
        bits,
    )
    assert np.array_equal(weight.dequantize(torch.float32).numpy(), rounded.dense)
    pairs = [(gptq_tensors, exports.gptq), (compressed_tensors, exports.compressed)]
    for write, independent in pairs + ([(awq_tensors, exports.awq)] if bits == 4 else []):
        expected = independent("layers.0.x", rounded, bits)
        actual = write("layers.0.x", weight)
        assert actual.keys() == expected.keys() - {"layers.0.x.bias"}
        for name, tensor in actual.items():
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name
            assert tensor.is_contiguous(), name


def test_symmetric_compressed_tensors_have_no_zero_points() -> None:
    weight = random_weight(8, 64, 32, 4, 0, zero=8)
    tensors = compressed_tensors("x", weight)
    assert set(tensors) == {"x.weight_packed", "x.weight_scale", "x.weight_shape"}
    check_same(read_compressed(tensors["x.weight_packed"], tensors["x.weight_scale"], None, 64), weight)


def test_gptq_keeps_an_order_of_columns() -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    plain = random_weight(8, 64, 16, 4, 0)
    weight = AffineTensor(plain.q, plain.scales, plain.mins, 4, order)
    dense = weight.dequantize(torch.float32)
    assert torch.equal(dense[:, order], plain.dequantize(torch.float32))
    t = gptq_tensors("x", weight)
    again = read_gptq(t["x.qweight"], t["x.qzeros"], t["x.scales"], t["x.g_idx"])
    assert again.columns is not None
    assert torch.equal(again.dequantize(torch.float32), dense)
    for write in (awq_tensors, compressed_tensors):
        with pytest.raises(ConfigError, match=r"x .*order of columns"):
            write("x", weight)


def test_groups_of_any_sizes_and_wrong_groups() -> None:
    weight = random_weight(8, 32, 16, 4, 3)
    t = gptq_tensors("x", weight)
    uneven = torch.tensor([0] * 5 + [1] * 27, dtype=torch.int32)
    read = read_gptq(t["x.qweight"], t["x.qzeros"], t["x.scales"], uneven)
    zeros = weight.integer_zeros().float()
    expected = (weight.q.float() - zeros[:, uneven]) * weight.scales[:, uneven]
    assert torch.equal(read.dequantize(torch.float32), expected)
    with pytest.raises(CheckpointError, match="g_idx names groups 0 to 2 of 2"):
        read_gptq(t["x.qweight"], t["x.qzeros"], t["x.scales"], torch.arange(32) // 12)


@pytest.mark.parametrize(
    ("columns", "count", "claimed", "expected"),
    [(128, 1, 32, 128), (128, 4, 32, 32), (128, 4, 128, 32), (208, 7, 32, 32), (208, 2, None, 128), (96, 2, 48, 48)],
)
def test_group_sizes(columns: int, count: int, claimed: int | None, expected: int) -> None:
    assert find_group_size(columns, count, claimed) == expected


def test_what_a_format_cannot_hold() -> None:
    with pytest.raises(ConfigError, match=r"a\.b cannot be stored as AWQ"):
        awq_tensors("a.b", random_weight(8, 32, 16, 8, 0))
    with pytest.raises(ConfigError, match=r"a\.b has 12 output channels, and AWQ packs 8 at a time"):
        awq_tensors("a.b", random_weight(12, 32, 16, 4, 0))
    with pytest.raises(ConfigError, match="20 input channels, and GPTQ packs 8"):
        gptq_tensors("a.b", random_weight(8, 20, 20, 4, 0))
    huge = AffineTensor.from_zeros(torch.ones(8, 16, dtype=torch.uint8), torch.full((8, 1), 1e6), torch.zeros(8, 1), 4)
    with pytest.raises(ConfigError, match=r"beyond the range of torch\.float16"):
        awq_tensors("a.b", huge)
    with pytest.raises(ConfigError, match="one per output channel"):
        smooth_quant_tensors("a.b", ScaledTensor(torch.ones(2, 4, dtype=torch.int8), torch.ones(2, 2), 2))
    floating = AffineTensor(torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 1), torch.full((8, 1), -0.5), 4)
    with pytest.raises(ValueError, match="no integer zeros"):
        awq_tensors("a.b", floating)


def test_smooth_quant_folder(tmp_path: Path) -> None:
    q = torch.randint(-127, 128, (8, 16), dtype=torch.int8)
    weight = ScaledTensor(q, torch.rand(8, 1), 16)
    save_file(smooth_quant_tensors("a", weight), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path, smooth_quant_config("int8"))
    assert checkpoint.infos["a.weight"].kind == "int8"
    value = checkpoint.read("a.weight")
    assert isinstance(value, ScaledTensor)
    assert torch.equal(value.q, q)
    assert torch.equal(value.scales, weight.scales)


@pytest.mark.parametrize("group_size", [-1, 128])
def test_configs_are_what_transformers_reads(group_size: int) -> None:
    """Through JSON, as from a config.json."""
    transformers = pytest.importorskip("transformers")

    def read(kind: Any, config: dict[str, Any]) -> Any:
        return kind.from_dict(json.loads(json.dumps(config)))

    awq = read(transformers.AwqConfig, awq_config(group_size, has_zeros=False, skipped=["mlp.gate"]))
    assert (awq.bits, awq.group_size, awq.zero_point, awq.quant_method.value) == (4, group_size, False, "awq")
    assert awq.modules_to_not_convert == ["mlp.gate"]
    gptq = read(transformers.GPTQConfig, gptq_config(8, group_size, is_symmetric=True, is_act_order=True))
    assert (gptq.bits, gptq.group_size, gptq.sym, gptq.desc_act) == (8, group_size, True, True)
    assert gptq.quant_method.value == "gptq"


def test_compressed_tensors_config_says_what_is_stored() -> None:
    config = compressed_tensors_config(4, 128, is_symmetric=False, skipped=["lm_head"])
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["strategy"]) == (4, 128, "group")
    assert (config["format"], config["ignore"]) == ("pack-quantized", ["lm_head"])
    assert "group_size" not in compressed_tensors_config(8, -1, True, [])["config_groups"]["group_0"]["weights"]
