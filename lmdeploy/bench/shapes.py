"""Architectures by name, without weights, to measure speed with random ones. Sizes are those of the published configs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from lmdeploy.errors import ConfigError


def _config(architecture: str, sizes: tuple[int, ...], **more: Any) -> dict[str, Any]:
    layers, hidden, heads, kv_heads, inner, vocab = sizes
    return {
        "architectures": [architecture],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **more,
    }


def _internlm2(*sizes: int) -> dict[str, Any]:
    more = {"model_type": "internlm2", "bias": False, "rope_theta": 1e6, "max_position_embeddings": 32768}
    return _config("InternLM2ForCausalLM", sizes, **more)


def _llama(*sizes: int, theta: float, length: int) -> dict[str, Any]:
    return _config("LlamaForCausalLM", sizes, model_type="llama", rope_theta=theta, max_position_embeddings=length)


def _qwen2(*sizes: int, tied: bool) -> dict[str, Any]:
    more = {"model_type": "qwen2", "rope_theta": 1e6, "max_position_embeddings": 32768, "tie_word_embeddings": tied}
    return _config("Qwen2ForCausalLM", sizes, **more)


SHAPES: dict[str, dict[str, Any]] = {
    "internlm2-1.8b": _internlm2(24, 2048, 16, 8, 8192, 92544),
    "internlm2-7b": _internlm2(32, 4096, 32, 8, 14336, 92544),
    "internlm2-20b": _internlm2(48, 6144, 48, 8, 16384, 92544),
    "llama2-7b": _llama(32, 4096, 32, 32, 11008, 32000, theta=1e4, length=4096),
    "llama3-8b": _llama(32, 4096, 32, 8, 14336, 128256, theta=5e5, length=8192),
    "qwen2.5-1.5b": _qwen2(28, 1536, 12, 2, 8960, 151936, tied=True),
    "qwen2.5-7b": _qwen2(28, 3584, 28, 4, 18944, 152064, tied=False),
    "mixtral-8x7b": _config(
        "MixtralForCausalLM",
        (32, 4096, 32, 8, 14336, 32000),
        model_type="mixtral",
        num_local_experts=8,
        num_experts_per_tok=2,
        rope_theta=1e6,
        max_position_embeddings=32768,
    ),
}
_QUANTIZATIONS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
}


def shape_overrides(quant: str | None) -> dict[str, Any] | None:
    """The config keys that make a shape's weights 4-bit ones. Raises ConfigError for another name than awq or gptq."""
    if quant is None:
        return None
    if quant not in _QUANTIZATIONS:
        raise ConfigError(f"--quant {quant}: random weights are made for {' and '.join(_QUANTIZATIONS)}")
    return {"quantization_config": _QUANTIZATIONS[quant]}


def shape_folder(name: str) -> Path:
    """A folder that holds the shape's config.json and nothing else."""
    folder = Path(tempfile.mkdtemp(prefix=f"lmdeploy-{name}-"))
    (folder / "config.json").write_text(json.dumps(SHAPES[name]), encoding="utf-8")
    return folder
