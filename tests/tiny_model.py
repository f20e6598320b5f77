"""A complete little Llama checkpoint with random weights and a real tokenizer, made in a folder of the test's choice.

It knows nothing of the package under test: config.json, model.safetensors, tokenizer.json and their companions are
written as a model's author would publish them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = (
    "The river runs past the old mill and under the bridge to the sea.",
    "A small engine reads the prompt, keeps its blocks in order and answers one token at a time.",
    "Numbers such as 10, 23 and 512 stand for sizes; words such as user, assistant and system stand for roles.",
    "你好，世界。今天的天气很好，我们去河边散步吧。",
    "Grüße aus Köln, une tasse de café, naïve façade — and an emoji 🙂 for the byte tokens.",
)


def make_tiny_llama(
    folder: Path,
    vocab_size: int = 384,
    *,
    seed: int = 0,
    chat_template: str | None = CHAT_TEMPLATE,
    generation_config: dict[str, Any] | None = None,
    **config_overrides: Any,
) -> Path:
    """Write the checkpoint into `folder` (made if missing) and return it.

    vocab_size: rows of the embedding; the tokenizer uses as many of them as its small corpus yields merges for, at
    least 260. seed: of the weights. chat_template: Jinja for tokenizer_config.json, None for a base model.
    generation_config: more keys of generation_config.json. config_overrides: keys of config.json, such as
    hidden_size, num_hidden_layers, tie_word_embeddings; the weights follow them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(vocab_size, config_overrides)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 3, **(generation_config or {})})
    save_file(_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    train_tokenizer(vocab_size).save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    return folder


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer; ids 0 to 3 are SPECIAL_TOKENS and every byte has a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 2, trainer)
    return tokenizer


def _config(vocab_size: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 3,
        **overrides,
    }


def _weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Scaled so that logits have a standard deviation of about 3: greedy choices are then no near-ties."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config["torch_dtype"])

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * gain * columns**-0.5).to(dtype)

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    embedding = matrix(config["vocab_size"], hidden, gain=3.0)
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(hidden, dtype=dtype)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            weights[f"{layer}.self_attn.{name}_proj.weight"] = matrix(rows * head_dim, hidden)
        weights[f"{layer}.self_attn.o_proj.weight"] = matrix(hidden, heads * head_dim)
        weights[f"{layer}.mlp.gate_proj.weight"] = matrix(inner, hidden)
        weights[f"{layer}.mlp.up_proj.weight"] = matrix(inner, hidden)
        weights[f"{layer}.mlp.down_proj.weight"] = matrix(hidden, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{norm}.weight"] = torch.ones(hidden, dtype=dtype)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden, gain=3.0)
    return weights


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
