"""Writes a tiny Hugging Face checkpoint as a GGUF file, as llama.cpp's converter does. It knows nothing of the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray
from safetensors import safe_open

Array = NDArray[Any]
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "phi3": MODEL_ARCH.PHI3,
    "internlm2": MODEL_ARCH.INTERNLM2,
}


def export_gguf(folder: Path, path: Path, kinds: dict[str, str] | None = None) -> dict[str, Array]:
    """Write `path` from a safetensors folder; returns the tensors as stored, by GGUF name, dequantized.

    kinds: GGUF name ending -> quantization, such as {"attn_q.weight": "Q4_0"}; everything else is F32.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, MODEL_ARCH_NAMES[architecture])
    _write_config(writer, config)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    stored = {}
    for hf_name, array in _converted(_read(folder), config):
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise KeyError(hf_name)
        kind = next((k for ending, k in (kinds or {}).items() if name.endswith(ending)), "F32")
        data = quantize(array, GGMLQuantizationType[kind])
        stored[name] = gguf.quants.dequantize(data, GGMLQuantizationType[kind])
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def pair_rows(array: Array, heads: int) -> Array:
    """Rows in the order of llama.cpp's rotation: the two halves of each head interleaved."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _read(folder: Path) -> dict[str, Array]:
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name).float().numpy() for name in tensors.keys()}  # noqa: SIM118


def _converted(tensors: dict[str, Array], config: dict[str, Any]) -> list[tuple[str, Array]]:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    result = []
    for name, array in tensors.items():
        if name.endswith("attention.wqkv.weight"):
            groups = array.reshape(kv_heads, heads // kv_heads + 2, -1, array.shape[-1])
            q, k, v = (part.reshape(-1, array.shape[-1]) for part in (groups[:, :-2], groups[:, -2], groups[:, -1]))
            parts = (("wq", pair_rows(q, heads)), ("wk", pair_rows(k, kv_heads)), ("wv", v))
            result += [(name.replace("wqkv", part), rows) for part, rows in parts]
        elif config["model_type"] == "llama" and ".q_proj." in name:
            result.append((name, pair_rows(array, heads)))
        elif config["model_type"] == "llama" and ".k_proj." in name:
            result.append((name, pair_rows(array, kv_heads)))
        elif config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
            result.append((name, array + 1))
        elif not name.endswith("rotary_emb.inv_freq"):
            result.append((name, array))
    return result


def _write_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(head_dim)
