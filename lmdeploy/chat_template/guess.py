"""Which named template a model without one of its own was trained with, told by config and vocabulary. It makes no template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmdeploy.tokenizer import Tokenizer

# The architectures of each template; without an architecture, as in a GGUF file, the model types.
_MODELS = {
    "internlm": ("InternLMForCausalLM", "internlm"),
    "internlm2": ("InternLM2ForCausalLM", "InternLM3ForCausalLM", "internlm2", "internlm3"),
    "internlm-xcomposer2": ("InternLMXComposer2ForCausalLM",),
    "qwen": ("QWenLMHeadModel", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "qwen", "qwen2", "qwen2_moe"),
    "chatml": ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "qwen3", "qwen3_moe"),
    # Baichuan-7B, spelled with a capital C, is a base model; its namesakes of model_type baichuan chat.
    "baichuan2": ("BaichuanForCausalLM",),
    "glm4": ("GlmForCausalLM", "Glm4ForCausalLM", "glm", "glm4"),
    "gemma": (
        *("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        *("gemma", "gemma2", "gemma3", "gemma3_text"),
    ),
    "falcon": ("FalconForCausalLM", "RWForCausalLM", "falcon"),
    "deepseek": ("DeepseekForCausalLM", "DeepseekV2ForCausalLM", "deepseek", "deepseek_v2"),
    "deepseek-vl": ("MultiModalityCausalLM",),
    "dbrx": ("DbrxForCausalLM", "dbrx"),
    "phi-3": ("Phi3ForCausalLM", "phi3"),
}
_TEMPLATES = {model: template for template, models in _MODELS.items() for model in models}
# What an InternVL config calls its conversation.
_INTERNVL = {
    "internlm2-chat": "internvl-internlm2",
    "Hermes-2": "internvl-zh-hermes2",
    "phi3-chat": "internvl-phi3",
    "internvl2_5": "internvl2_5",
}
# Special tokens that only one way of chatting uses, for architectures that many families share.
_BY_TOKEN = (("<|start_header_id|>", "llama3"), ("<|im_start|>", "chatml"), ("<start_of_turn>", "gemma"))


def template_of(architecture: str) -> str | None:
    """The named template of an architecture; None where the vocabulary decides."""
    return _TEMPLATES.get(architecture)


def guess_template_name(hf_config: Mapping[str, Any], tokenizer: Tokenizer) -> str | None:
    """The named template of an architecture, told by config and vocabulary; None if nothing tells it."""
    architecture = str((hf_config.get("architectures") or [""])[0])
    model_type = str(hf_config.get("model_type") or tokenizer.model_type)
    if model_type == "chatglm" or architecture.startswith("ChatGLM"):
        return _guess_glm(tokenizer)
    if architecture == "InternVLChatModel":
        return _INTERNVL.get(str(hf_config.get("template")))
    if architecture == "LlavaLlamaForCausalLM":
        return "llava-chatml" if "<|im_start|>" in tokenizer.special_tokens else "llava-v1"
    if architecture == "LlavaMistralForCausalLM":
        return "mistral"
    named = _TEMPLATES.get(architecture or model_type)
    if named is not None:
        return named
    if tokenizer.token_to_id("▁<PRE>") is not None:
        return "codellama"
    for token, name in _BY_TOKEN:
        if token in tokenizer.special_tokens:
            return "yi" if name == "chatml" and hf_config.get("vocab_size") == 64000 else name
    return None


def _guess_glm(tokenizer: Tokenizer) -> str:
    """ChatGLM2, ChatGLM3 and GLM-4 share an architecture; their special tokens differ."""
    if "<sop>" in tokenizer.special_tokens:
        return "glm4"
    return "chatglm3" if tokenizer.token_to_id("<|assistant|>") is not None else "chatglm"
