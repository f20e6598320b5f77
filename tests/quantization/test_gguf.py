"""Every GGUF tensor type against the gguf package's own dequantization, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.errors import CheckpointError
from lmdeploy.quantization.gguf import read_tensor, tensor_kind
from lmdeploy.quantization.packing import AffineTensor
from tests.quantization.affine_data import HALF_FIELDS, random_blocks

ROWS, COLUMNS = 6, 512
STORAGE = {"Q4_0": 4, "Q4_1": 4, "Q2_K": 4, "Q3_K": 4, "Q4_K": 4, "Q5_0": 8, "Q5_1": 8, "Q8_0": 8, "Q5_K": 8, "Q6_K": 8}
GROUPS = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16}


@pytest.mark.parametrize("name", HALF_FIELDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_affine_types_are_lossless(name: str, seed: int) -> None:
    data = random_blocks(name, ROWS, COLUMNS, seed)
    kind = GGMLQuantizationType[name]
    weight = read_tensor(torch.from_numpy(data.reshape(-1)), int(kind), (ROWS, COLUMNS))
    assert isinstance(weight, AffineTensor)
    assert tensor_kind(int(kind)) == f"affine{weight.bits}" == f"affine{STORAGE[name]}"
    assert weight.group_size == GROUPS.get(name, 32)
    assert int(weight.q.max()) < 1 << weight.bits
    assert weight.scales.dtype == weight.mins.dtype == torch.float32
    assert torch.equal(weight.dequantize(torch.float32), torch.from_numpy(dequantize(data, kind)))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_quantized_matrix_comes_back_close(name: str) -> None:
    kind = GGMLQuantizationType[name]
    original = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    data = torch.from_numpy(quantize(original, kind).reshape(-1))
    weight = read_tensor(data, int(kind), (ROWS, COLUMNS))
    assert isinstance(weight, AffineTensor)
    error = (weight.dequantize(torch.float32) - torch.from_numpy(original)).abs().max()
    assert 0 < error < 4 / (1 << int(name[1]))


@pytest.mark.parametrize(
    "name",
    ["IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4"],
)
def test_other_types_come_out_dense(name: str) -> None:
    kind = GGMLQuantizationType[name]
    data = random_blocks(name, ROWS, COLUMNS)
    with np.errstate(all="ignore"):
        weight = read_tensor(torch.from_numpy(data.reshape(-1)), int(kind), (ROWS, COLUMNS))
        expected = torch.from_numpy(dequantize(data, kind))
    assert tensor_kind(int(kind)) == "dense"
    assert isinstance(weight, torch.Tensor)
    assert weight.dtype == torch.float32
    assert torch.equal(torch.nan_to_num(weight), torch.nan_to_num(expected))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16), ("F64", torch.float64)],
)
def test_dense_types_are_views(name: str, dtype: torch.dtype) -> None:
    expected = torch.arange(12.0, dtype=dtype).view(3, 4)
    data = expected.flatten().view(torch.uint8)
    value = read_tensor(data, int(GGMLQuantizationType[name]), (3, 4))
    assert isinstance(value, torch.Tensor)
    assert torch.equal(value, expected)
    assert value.data_ptr() == data.data_ptr()


def test_stacked_experts_keep_their_shape() -> None:
    data = random_blocks("Q4_K", 8, 256)
    weight = read_tensor(torch.from_numpy(data.reshape(-1)), int(GGMLQuantizationType.Q4_K), (2, 4, 256))
    assert isinstance(weight, AffineTensor)
    expected = torch.from_numpy(dequantize(data, GGMLQuantizationType.Q4_K)).view(2, 4, 256)
    assert torch.equal(weight.dequantize(torch.float32), expected)


def test_a_type_that_nothing_dequantizes_is_named() -> None:
    kind = GGMLQuantizationType.Q8_K
    data = torch.zeros(GGML_QUANT_SIZES[kind][1], dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="Q8_K"):
        read_tensor(data, int(kind), (1, 256))
