"""The table of model types, for configs that name no architecture. It owns names only."""

from __future__ import annotations

from lmdeploy.errors import ModelNotSupported

MODEL_TYPES: dict[str, str] = {
    "Yi": "YiForCausalLM",
    "baichuan": "BaichuanForCausalLM",
    "chatglm": "ChatGLMModel",
    "dbrx": "DbrxForCausalLM",
    "deepseek": "DeepseekForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "falcon": "FalconForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "internlm": "InternLMForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen": "QWenLMHeadModel",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""model_type -> architecture, for configs that name none (GGUF files, the language part of a vision-language model)."""


def architecture_of(model_type: object) -> str:
    """The architecture of a config's model_type. Raises ModelNotSupported."""
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        from lmdeploy.models.nearest import nearest

        raise ModelNotSupported(
            f"the config names no architecture and model_type {model_type!r} is not supported"
            f"{nearest(str(model_type), MODEL_TYPES)}; `lmdeploy list` shows the supported architectures"
        )
    return MODEL_TYPES[model_type]
