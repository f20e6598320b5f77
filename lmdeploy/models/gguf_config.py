"""A GGUF file's metadata in the words of a Hugging Face config. Of the tensors it reads only rotary divisors."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmdeploy.errors import ModelNotSupported
from lmdeploy.gguf_file import GGUFTensorInfo, read_metadata, read_tensor_index

MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "internlm2": "internlm2",
}
"""`general.architecture` -> model_type."""

KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}
GEMMA3_27B_LAYERS = 62


def gguf_to_hf(path: Path) -> dict[str, Any]:
    """The config of a GGUF file. Raises ModelNotSupported for an architecture that is not in MODEL_TYPES."""
    metadata = read_metadata(path)
    tensors = {info.name: info for info in read_tensor_index(path)}
    architecture = str(metadata.get("general.architecture"))
    if architecture not in MODEL_TYPES:
        raise ModelNotSupported(
            f"{path}: GGUF architecture {architecture!r} is not supported; supported: {', '.join(MODEL_TYPES)}"
        )
    own = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    hf = {name: own[key] for key, name in KEYS.items() if own.get(key) is not None}
    head_dim = int(hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"])
    hf |= {
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "sliding_window": own.get("attention.sliding_window") or None,
        "use_sliding_window": architecture in ("gemma3", "phi3", "llama"),
        "partial_rotary_factor": own.get("rope.dimension_count", head_dim) / head_dim,
        "rope_scaling": _rope_scaling(path, own, tensors),
        "original_max_position_embeddings": own.get("rope.scaling.original_context_length"),
        "bos_token_id": own.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [
            own[key] for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if key in own
        ],
    }
    if architecture == "gemma3":
        is_27b = hf["num_hidden_layers"] == GEMMA3_27B_LAYERS
        hf["query_pre_attn_scalar"] = hf["hidden_size"] // hf["num_attention_heads"] if is_27b else head_dim
    return hf


def _rope_scaling(path: Path, own: Mapping[str, Any], tensors: Mapping[str, GGUFTensorInfo]) -> dict[str, Any] | None:
    """rope_scaling as a HF config has it; divisors of frequencies, Llama 3's among them, become longrope's."""
    factor = own.get("rope.scaling.factor")
    for short, long in (("rope_factors_short", "rope_factors_long"), ("rope_freqs", "rope_freqs")):
        if f"{short}.weight" in tensors:
            return {
                "rope_type": "longrope",
                "short_factor": _read_floats(path, tensors[f"{short}.weight"]),
                "long_factor": _read_floats(path, tensors[f"{long}.weight"]),
                "attention_factor": own.get("rope.scaling.attn_factor", 1.0),
            }
    kind = own.get("rope.scaling.type", "linear" if factor else "none")
    if kind == "none":
        return None
    return {"rope_type": kind, "factor": factor}


def _read_floats(path: Path, info: GGUFTensorInfo) -> list[float]:
    with open(path, "rb") as file:
        file.seek(info.offset_bytes)
        return list(struct.unpack(f"<{info.size_bytes // 4}f", file.read(info.size_bytes)))
