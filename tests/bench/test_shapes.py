"""Shapes by name, and the fixed table of measurements that uses them."""

from __future__ import annotations

import pytest

from lmdeploy.bench.preset import PEERS, format_row, format_table
from lmdeploy.bench.roofline import decode_floor, prefill_floor
from lmdeploy.bench.shapes import SHAPES, shape_folder, shape_overrides
from lmdeploy.engine.validation import EngineInfo
from lmdeploy.errors import ConfigError
from lmdeploy.layers.linear import Linear
from lmdeploy.messages import QuantPolicy
from lmdeploy.models.config import load_config
from lmdeploy.models.loader import build_model, load_model


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_shape_is_a_model_that_can_be_built(name: str) -> None:
    config = load_config(shape_folder(name))
    model = build_model(config)
    assert len(model.layers) == SHAPES[name]["num_hidden_layers"]
    assert config.num_kv_heads == SHAPES[name]["num_key_value_heads"]


def test_quantized_shapes() -> None:
    assert shape_overrides(None) is None
    assert load_config(shape_folder("internlm2-7b"), shape_overrides("awq")).quantization is not None
    with pytest.raises(ConfigError, match="--quant fp3"):
        shape_overrides("fp3")


def test_random_weights_are_4_bit_where_the_config_says_so() -> None:
    small = {
        "num_hidden_layers": 1,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    overrides = {**small, "num_key_value_heads": 2, **(shape_overrides("awq") or {})}
    model = load_model(shape_folder("internlm2-7b"), dtype="bfloat16", load_format="dummy", hf_overrides=overrides)
    names = {name: module.method.name for name, module in model.named_modules() if isinstance(module, Linear)}
    assert names["layers.0.mlp.down_proj"] == names["layers.0.self_attn.qkv_proj"] == "affine"
    assert names["lm_head"] == names["embed_tokens"] == "unquantized"
    weight = model.layers[0].mlp.down_proj.method.dense_weight(model.layers[0].mlp.down_proj).float()
    assert weight.std().item() == pytest.approx(512**-0.5, rel=0.02)


def test_the_prefill_floor_is_that_of_the_arithmetic() -> None:
    """798 TFLOP/s over 2 * 6.979e9 for the layers and 2 * 4096 * 4096 a layer for causal attention."""
    floor = prefill_floor(load_config(shape_folder("internlm2-7b")), 4096, 798e12)
    assert floor == pytest.approx(798e12 / (2 * 6.979e9 + 32 * 2 * 4096 * 4096), rel=2e-3)


def test_the_decode_floor_is_that_of_what_a_step_reads() -> None:
    """Of an embedding with a table of its own a step reads a few rows, of one that is the head, too, all of it."""
    for name, is_tied in (("internlm2-7b", False), ("qwen2.5-1.5b", True)):
        model = load_config(shape_folder(name))
        table = 2 * model.vocab_size * model.hidden_size
        info = EngineInfo("", "bfloat16", "cuda", model.vocab_size, 1, 1, 1, 1, weight_bytes=10 * table, load_s=1.0)
        floor = decode_floor(model, info, QuantPolicy.NONE, 2e12)
        assert floor.weight_bytes == (10 if is_tied else 9) * table
        assert floor.tokens_per_s(1, 0) == pytest.approx(2e12 / floor.weight_bytes)
        assert decode_floor(model, info, QuantPolicy.NONE, 2e12, is_gguf=True).weight_bytes == 10 * table
        with_products = decode_floor(model, info, QuantPolicy.NONE, 2e12, 1e15)
        assert with_products.tokens_per_s(1, 0) == floor.tokens_per_s(1, 0)
        assert with_products.tokens_per_s(10**6, 0) == pytest.approx(1 / with_products.product_s)


def test_rows_name_floor_target_and_peers() -> None:
    row = {"row": "AWQ B=1 steady", "tok_s": 500.0, "floor": 625.0, "target": 460, "lmdeploy": 132.0, "vllm": None}
    text = format_row(row)
    assert "floor 625 (0.80x)" in text
    assert "target 460 (1.09x)" in text
    assert "vllm -" in text
    table = {"shape": "internlm2-7b", "device": "H100", "rows": [row], "start_s": {"AWQ": 1.81}}
    assert "start to ready: AWQ 1.8 s" in format_table(table)
    assert set(PEERS) <= set(SHAPES)
