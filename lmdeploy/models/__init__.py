"""The table of architectures. It owns names only; a model's code is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lmdeploy.errors import ModelNotSupported

if TYPE_CHECKING:
    from lmdeploy.models.base import CausalLM

ARCHITECTURES: dict[str, str] = {
    "BaiChuanForCausalLM": "baichuan:BaichuanForCausalLM",
    "BaichuanForCausalLM": "baichuan:BaichuanForCausalLM",
    "ChatGLMForConditionalGeneration": "chatglm:ChatGLMForConditionalGeneration",
    "ChatGLMModel": "chatglm:ChatGLMForConditionalGeneration",
    "DbrxForCausalLM": "dbrx:DbrxForCausalLM",
    "DeepseekForCausalLM": "deepseek:DeepseekForCausalLM",
    "DeepseekV2ForCausalLM": "deepseek_v2:DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM": "deepseek_v2:DeepseekV3ForCausalLM",
    "FalconForCausalLM": "falcon:FalconForCausalLM",
    "Gemma2ForCausalLM": "gemma:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "gemma:Gemma3ForCausalLM",
    "GemmaForCausalLM": "gemma:GemmaForCausalLM",
    "Glm4ForCausalLM": "glm4:Glm4ForCausalLM",
    "GptOssForCausalLM": "gpt_oss:GptOssForCausalLM",
    "InternLM2ForCausalLM": "internlm2:InternLM2ForCausalLM",
    "InternLM3ForCausalLM": "internlm:InternLM3ForCausalLM",
    "InternLMForCausalLM": "internlm:InternLMForCausalLM",
    "LlamaForCausalLM": "llama:LlamaForCausalLM",
    "MistralForCausalLM": "llama:LlamaForCausalLM",
    "MixtralForCausalLM": "mixtral:MixtralForCausalLM",
    "Phi3ForCausalLM": "phi3:Phi3ForCausalLM",
    "QWenLMHeadModel": "qwen:QWenLMHeadModel",
    "Qwen2ForCausalLM": "qwen2:Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM": "qwen2:Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM": "qwen3:Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "qwen3:Qwen3MoeForCausalLM",
    "RWForCausalLM": "falcon:FalconForCausalLM",
    "YiForCausalLM": "yi:YiForCausalLM",
}
"""Hugging Face architecture -> module and class in this package."""


def model_class(architecture: str) -> type[CausalLM]:
    """The model class of a Hugging Face architecture. Raises ModelNotSupported."""
    if architecture not in ARCHITECTURES:
        from lmdeploy.models.nearest import nearest

        raise ModelNotSupported(
            f"architecture {architecture!r} is not supported{nearest(architecture, ARCHITECTURES)}; `lmdeploy list` shows all"
        )
    module, name = ARCHITECTURES[architecture].split(":")
    return getattr(import_module(f"lmdeploy.models.{module}"), name)
