"""Reading configs: both generations of keys, the families' dialects, and what stops with a clear error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmdeploy.errors import CheckpointError, ConfigError, ModelNotSupported
from lmdeploy.models import model_class
from lmdeploy.models.config import ModelConfig, load_config
from tests.models.golden_data import ROOT, read_config, text_folders

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({**LLAMA, **changes})


def test_plain_llama_and_its_defaults() -> None:
    config = read()
    assert (config.num_kv_heads, config.head_dim, config.activation, config.norm_eps) == (4, 16, "silu", 1e-6)
    assert (config.tie_word_embeddings, config.qkv_bias, config.dtype, config.eos_token_ids) == (False, False, None, ())
    assert config.rope is not None
    assert (config.rope.kind, config.rope.theta, config.rope.dim) == ("default", 10000.0, 16)
    assert config.layer_windows == (None, None)
    assert config.kv_shape == (2, 4, 16)
    assert config.session_len == 64


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}, "torch_dtype": "bfloat16"},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}, "dtype": "torch.bfloat16"},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **SCALING}, "dtype": "bfloat16"},
        {
            "rope_parameters": {"full_attention": {"rope_theta": 5e5, "rope_type": "llama3", **SCALING}},
            "dtype": "bfloat16",
        },
    ],
)
def test_both_generations_of_rope_and_dtype_keys(keys: dict[str, Any]) -> None:
    config = read(**keys)
    assert config.dtype == "bfloat16"
    assert config.rope is not None
    assert (config.rope.kind, config.rope.theta, config.rope.factor) == ("llama3", 5e5, 8.0)
    assert (config.rope.low_freq_factor, config.rope.high_freq_factor, config.rope.trained_length) == (1.0, 4.0, 16)


def test_rope_nested_by_layer_type() -> None:
    rope = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    types = ["sliding_attention", "full_attention"]
    config = read(architectures=["Gemma3ForCausalLM"], rope_parameters=rope, layer_types=types, sliding_window=8)
    assert config.layer_windows == (8, None)
    assert config.rope is not None
    assert config.local_rope is not None
    assert (config.rope.theta, config.rope.kind, config.rope.factor) == (1e6, "linear", 8.0)
    assert (config.local_rope.theta, config.local_rope.kind) == (1e4, "default")
    assert config.head_dim == 256


def test_gemma3_from_old_keys() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    config = read(architectures=["Gemma3ForCausalLM"], rope_scaling=scaling, num_hidden_layers=6)
    assert config.layer_windows == (4096,) * 5 + (None,)
    assert config.rope is not None
    assert config.local_rope is not None
    assert (config.rope.theta, config.rope.kind) == (1e6, "linear")
    assert (config.local_rope.theta, config.local_rope.kind) == (1e4, "default")
    assert (config.attention_scale, config.embed_scale, config.norm_offset) == (256**-0.5, 8.0, 1.0)
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("scaling", "magnitude", "length"),
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 1.138629436, 256),
        ({"type": "yarn", "factor": 4.0, "attention_factor": 1.5}, 1.5, 256),
        ({"type": "yarn", "factor": 4.0, "mscale": 0.5, "mscale_all_dim": 1.0}, 1.0693147 / 1.1386294, 256),
        ({"type": "dynamic", "factor": 4.0}, 1.0, 64),
    ],
)
def test_yarn_magnitude_and_session_length(scaling: dict[str, Any], magnitude: float, length: int) -> None:
    config = read(rope_scaling=scaling)
    assert config.rope is not None
    assert config.rope.attention_factor == pytest.approx(magnitude, rel=1e-6)
    assert config.session_len == length


def test_longrope_reads_its_original_length_from_either_place() -> None:
    factors = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    for keys in (
        {"rope_scaling": factors, "original_max_position_embeddings": 16},
        {"rope_scaling": {**factors, "original_max_position_embeddings": 16}},
    ):
        rope = read(**keys).rope
        assert rope is not None
        assert (rope.kind, rope.trained_length, rope.long_factor) == ("longrope", 16, (2.0,) * 8)
        assert rope.attention_factor == pytest.approx(1.5**0.5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "'spiral'.*supported: default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs a positive number 'factor', not None"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "needs 8 numbers 'short_factor', not 1 numbers",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling must be a mapping"),
        ({"hidden_act": "mish"}, "hidden_act 'mish'.*supported: silu"),
        ({"hidden_size": None}, "'hidden_size' must be a positive integer, not None"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4.*num_key_value_heads 3"),
        ({"sliding_window": 8, "layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        (
            {"architectures": ["ChatGLMModel"], "multi_query_attention": False},
            "'multi_query_attention' is False; only True",
        ),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "DeepseekV3ForCausalLM has no key 'kv_lora_rank'"),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "scoring_func": "tanh"},
            "scoring_func 'tanh'",
        ),
    ],
)
def test_unsupported_values_name_key_value_and_choice(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**keys)


def test_unknown_architecture_and_model_type() -> None:
    with pytest.raises(ModelNotSupported, match=r"'RobertaModel' is not supported; `lmdeploy list` shows all"):
        read(architectures=["RobertaModel"])
    with pytest.raises(
        ModelNotSupported, match=r"'Qwen2VLForConditional.* is not .*nearest .*: Qwen2ForCausalLM.*list`"
    ):
        read(architectures=["Qwen2VLForConditionalGeneration"])
    with pytest.raises(ModelNotSupported, match=r"model_type 'qwen2_vl' is not .* qwen2, .*`lmdeploy list`"):
        read(architectures=None, model_type="qwen2_vl")


@pytest.mark.parametrize("folder", text_folders())
def test_model_type_stands_in_for_the_architecture(folder: str) -> None:
    hf = read_config(ROOT / folder)
    config = ModelConfig.from_hf({key: value for key, value in hf.items() if key != "architectures"})
    assert model_class(config.architecture) is model_class(hf["architectures"][0])
    assert replace(config, architecture=hf["architectures"][0]) == ModelConfig.from_hf(hf)


def test_windows() -> None:
    assert read(sliding_window=8).layer_windows == (8, 8)
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 1}
    assert read(**qwen).layer_windows == (None, None)
    assert read(**qwen, use_sliding_window=True).layer_windows == (None, 8)


def test_long_context_settings_work_on_any_rotary_model() -> None:
    plain = read()
    assert plain.with_long_context() is plain
    stretched = plain.with_long_context(rope_scaling_factor=2.5, use_logn_attn=True)
    assert stretched.rope is not None
    assert (stretched.rope.kind, stretched.rope.factor, stretched.rope.trained_length) == ("dynamic", 2.5, 64)
    assert stretched.logn_length == 64
    dynamic = read(rope_scaling={"type": "dynamic", "factor": 4.0})
    assert dynamic.with_long_context(rope_scaling_factor=1.0).rope == dynamic.rope
    alibi = load_config(ROOT / "falcon/rw-1b-alibi")
    with pytest.raises(ConfigError, match="no rotary embedding"):
        alibi.with_long_context(use_logn_attn=True)


def test_folder_overrides_and_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 2, "rope_scaling": {"type": "yarn"}}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    config = load_config(tmp_path, {"rope_scaling": {"factor": 2.0}, "vocab_size": 400})
    assert config.eos_token_ids == (2, 5)
    assert config.vocab_size == 400
    assert config.rope is not None
    assert (config.rope.kind, config.rope.factor) == ("yarn", 2.0)


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load_config(tmp_path)


def test_old_qwen_names() -> None:
    hf = read_config(ROOT / "qwen/7b")
    new = ModelConfig.from_hf(hf)
    names = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    names |= {"intermediate_size": "ffn_hidden_size", "vocab_size": "padded_vocab_size"}
    assert ModelConfig.from_hf({names.get(key, key): value for key, value in hf.items()}) == new
    assert new.intermediate_size * 2 == hf["intermediate_size"]


@pytest.mark.parametrize("folder", ["falcon/7b", "falcon/40b", "falcon/rw-1b-alibi"])
def test_old_falcon_names(folder: str) -> None:
    hf = read_config(ROOT / folder)
    names = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "num_kv_heads": "n_head_kv"}
    old = {names.get(key, key): value for key, value in hf.items() if key != "new_decoder_architecture"}
    config = ModelConfig.from_hf({**old, "architectures": ["RWForCausalLM"]})
    assert replace(config, architecture="FalconForCausalLM") == ModelConfig.from_hf(hf)


@pytest.mark.parametrize("folder", text_folders())
def test_every_golden_config_reads_alike_with_new_keys(folder: str) -> None:
    hf = read_config(ROOT / folder)
    config = ModelConfig.from_hf(hf)
    new = {key: value for key, value in hf.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    if "torch_dtype" in hf:
        new["dtype"] = hf["torch_dtype"]
    if config.rope is not None and ("rope_theta" in hf or "rope_scaling" in hf):
        scaling = hf.get("rope_scaling") or {"rope_type": "default"}
        new["rope_parameters"] = {**scaling, "rope_theta": hf.get("rope_theta", config.rope.theta)}
    assert ModelConfig.from_hf(new) == config


def test_gguf_metadata_in_hf_words(builtin_model: Path) -> None:
    config = load_config(builtin_model)
    assert (config.architecture, config.vocab_size, config.hidden_size, config.num_layers) == (
        "LlamaForCausalLM",
        49152,
        576,
        30,
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.intermediate_size) == (9, 3, 64, 1536)
    assert config.tie_word_embeddings
    assert config.rope is not None
    assert (config.rope.theta, config.rope.kind, config.max_position_embeddings) == (1e5, "default", 8192)
    assert config.eos_token_ids == (2,)
