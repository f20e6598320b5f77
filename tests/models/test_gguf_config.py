"""GGUF metadata in the words of a Hugging Face config, architecture by architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lmdeploy.errors import ModelNotSupported
from lmdeploy.models.config import ModelConfig, load_config

VOCAB, HIDDEN, HEADS, KV_HEADS, LAYERS = 40, 64, 4, 2, 3


def write(path: Path, architecture: str, tensors: dict[str, np.ndarray] | None = None, **own: Any) -> Path:
    """A GGUF file with the least metadata and an embedding; own: more metadata below the architecture's prefix."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_eos_token_id(7)
    writer.add_eot_token_id(9)
    for key, value in own.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        (writer.add_uint32 if isinstance(value, int) else add)(f"{architecture}.{key}", value)
    for name, values in {"token_embd.weight": np.zeros((VOCAB, HIDDEN), np.float32), **(tensors or {})}.items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check_sizes(config: ModelConfig, architecture: str) -> None:
    assert config.architecture == architecture
    assert (config.vocab_size, config.hidden_size, config.num_layers, config.intermediate_size) == (40, 64, 3, 96)
    assert (config.num_heads, config.num_kv_heads, config.max_position_embeddings) == (4, 2, 4096)
    assert config.norm_eps == pytest.approx(1e-5)
    assert config.eos_token_ids == (7, 9)


def test_llama_with_and_without_head_and_biases(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "tied.gguf", "llama", **{"rope.freq_base": 5e5}))
    check_sizes(config, "LlamaForCausalLM")
    assert config.rope is not None
    assert (config.rope.kind, config.rope.theta, config.rope.dim) == ("default", 5e5, 16)
    assert (config.tie_word_embeddings, config.qkv_bias, config.layer_windows) == (True, False, (None,) * 3)
    tensors = {"output.weight": np.zeros((VOCAB, HIDDEN)), "blk.0.attn_output.bias": np.zeros(HIDDEN)}
    untied = load_config(write(tmp_path / "untied.gguf", "llama", tensors))
    assert (untied.tie_word_embeddings, untied.qkv_bias) == (False, True)


def test_llama3_divisors_are_read_from_their_tensor(tmp_path: Path) -> None:
    divisors = np.linspace(1, 8, 8)
    config = load_config(write(tmp_path / "m.gguf", "llama", {"rope_freqs.weight": divisors}))
    assert config.rope is not None
    assert (config.rope.kind, config.rope.attention_factor) == ("longrope", 1.0)
    assert config.rope.short_factor == config.rope.long_factor == pytest.approx(tuple(divisors))


@pytest.mark.parametrize(("architecture", "name"), [("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")])
def test_qwen_with_yarn(tmp_path: Path, architecture: str, name: str) -> None:
    own = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 1024}
    config = load_config(write(tmp_path / "m.gguf", architecture, **own, **{"attention.key_length": 32}))
    check_sizes(config, name)
    assert config.head_dim == 32
    assert (config.qkv_bias, config.qk_norm) == (architecture == "qwen2", architecture == "qwen3")
    assert config.rope is not None
    assert (config.rope.kind, config.rope.factor, config.rope.trained_length) == ("yarn", 4.0, 1024)


def test_gemma3_rotates_its_windows_otherwise(tmp_path: Path) -> None:
    own = {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    own |= {"attention.sliding_window": 512, "attention.key_length": 32}
    config = load_config(write(tmp_path / "m.gguf", "gemma3", **own))
    check_sizes(config, "Gemma3ForCausalLM")
    assert config.layer_windows == (512, 512, 512)
    assert config.attention_scale == 32**-0.5
    assert config.rope is not None
    assert config.local_rope is not None
    assert (config.rope.kind, config.rope.factor, config.rope.theta) == ("linear", 8.0, 1e6)
    assert (config.local_rope.kind, config.local_rope.theta) == ("default", 1e4)


def test_phi3_with_long_and_short_divisors(tmp_path: Path) -> None:
    tensors = {"rope_factors_short.weight": np.ones(6), "rope_factors_long.weight": np.full(6, 3.0)}
    own = {"rope.dimension_count": 12, "rope.scaling.original_context_length": 1024, "rope.scaling.attn_factor": 1.25}
    config = load_config(write(tmp_path / "m.gguf", "phi3", tensors, **own, **{"attention.sliding_window": 2047}))
    check_sizes(config, "Phi3ForCausalLM")
    assert config.layer_windows == (2047,) * 3
    assert config.rope is not None
    assert (config.rope.kind, config.rope.dim, config.rope.trained_length) == ("longrope", 12, 1024)
    assert (config.rope.attention_factor, config.rope.short_factor, config.rope.long_factor) == (
        1.25,
        (1.0,) * 6,
        (3.0,) * 6,
    )


def test_internlm2_and_an_unknown_architecture(tmp_path: Path) -> None:
    check_sizes(load_config(write(tmp_path / "a.gguf", "internlm2")), "InternLM2ForCausalLM")
    with pytest.raises(ModelNotSupported, match=r"'mamba'.*supported: llama, qwen2"):
        load_config(write(tmp_path / "b.gguf", "mamba"))
