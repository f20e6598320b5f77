"""Writes smollm2_reference.json: what transformers answers, in float32, on the built-in model's dequantized weights.

Run as `python -m tests.data.make_reference MODEL.gguf`; needs the packages transformers and gguf. Nothing of the package
under test takes part, the tokenizer included.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
NEW_TOKENS = 64
PERPLEXITY_WINDOW = 512
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = [
    CHAT.format("The capital of France is"),
    CHAT.format("What is the capital of Germany?"),
    CHAT.format("Write a short story about a lighthouse keeper."),
    CHAT.format("Explain why the sky is blue in two sentences."),
    CHAT.format("List three suggestions about time management."),
    CHAT.format("Hi, pls intro yourself"),
    "def fibonacci(n):\n    ",
    "Once upon a time, in 1984,",
    "The three laws of motion are\n\n1.",
    "The weather today is 23.5 degrees and",
]


def read_model(reader: Any) -> LlamaForCausalLM:
    """The GGUF file's Llama with float32 weights, rows of q and k back in Hugging Face's order."""
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=fields["llama.rope.freq_base"],
        tie_word_embeddings=True,
    )
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type))).float()
        kind = tensor.name.removesuffix(".weight")
        if kind.startswith("blk."):
            _, layer, part = kind.split(".")
            if part in heads:
                weight = weight.view(heads[part], -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            kind = f"layers.{layer}.{LAYER_NAMES[part]}"
        kind = {"token_embd": "embed_tokens", "output_norm": "norm"}.get(kind, kind)
        state[f"model.{kind}.weight"] = weight
    model = LlamaForCausalLM(config)
    missing, surplus = model.load_state_dict(state, strict=False)
    if surplus or missing != ["lm_head.weight"]:
        raise SystemExit(f"the file does not fit Llama: missing {missing}, surplus {surplus}")
    model.tie_weights()
    return model.eval()


def read_tokenizer(reader: Any) -> Tokenizer:
    """SmolLM2's tokenizer: single digits, then byte-level BPE."""
    tokens, merges, types = (
        reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")
    )
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def greedy(model: LlamaForCausalLM, prompt_ids: list[int]) -> tuple[list[int], float]:
    """The next NEW_TOKENS tokens, end tokens ignored, and the smallest gap between the two best logits."""
    ids, past, output, margins = torch.tensor([prompt_ids]), None, [], []
    for _ in range(NEW_TOKENS):
        step = model(ids, past_key_values=past, use_cache=True)
        best = step.logits[0, -1].topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        output.append(int(best.indices[0]))
        ids, past = torch.tensor([[output[-1]]]), step.past_key_values
    return output, min(margins)


def perplexity(model: LlamaForCausalLM, ids: list[int]) -> float:
    """exp of the mean negative log-likelihood over whole windows, the first token of each not scored."""
    losses = []
    for start in range(0, len(ids) - PERPLEXITY_WINDOW + 1, PERPLEXITY_WINDOW):
        window = torch.tensor([ids[start : start + PERPLEXITY_WINDOW]])
        logprobs = torch.log_softmax(model(window).logits[0, :-1], dim=-1)
        losses.append(-logprobs.gather(1, window[0, 1:, None]))
    return math.exp(torch.cat(losses).mean().item())


@torch.inference_mode()
def main() -> None:
    reader = gguf.GGUFReader(sys.argv[1])
    model, tokenizer = read_model(reader), read_tokenizer(reader)
    answers = []
    for prompt in PROMPTS:
        prompt_ids = tokenizer.encode(prompt).ids
        output, margin = greedy(model, prompt_ids)
        text = tokenizer.decode(output, skip_special_tokens=True)
        answers.append({"prompt": prompt, "prompt_ids": prompt_ids, "greedy": output, "text": text, "margin": margin})
    text_ids = tokenizer.encode((HERE / "harbour.txt").read_text(encoding="utf-8")).ids
    reference = {"answers": answers, "perplexity": perplexity(model, text_ids), "window": PERPLEXITY_WINDOW}
    target = HERE / "smollm2_reference.json"
    target.write_text(json.dumps(reference, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
