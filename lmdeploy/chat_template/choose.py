"""Decides which chat template a model gets. It knows the templates only by name.

The user's choice comes first, then the model's own Jinja, then a named template by architecture and vocabulary. The path of
a model says nothing: a renamed folder is the same model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy.chat_template.base import ChatTemplate, Message, RenderOptions
from lmdeploy.errors import ConfigError
from lmdeploy.messages import ChatTemplateConfig

if TYPE_CHECKING:
    from lmdeploy.tokenizer import Tokenizer

_BY_ARCHITECTURE = {
    "InternLMForCausalLM": "internlm",
    "InternLM2ForCausalLM": "internlm2",
    "InternLM3ForCausalLM": "internlm2",
    "InternLMXComposer2ForCausalLM": "internlm-xcomposer2",
    "QWenLMHeadModel": "qwen",
    "Qwen2ForCausalLM": "qwen",
    "Qwen2MoeForCausalLM": "qwen",
    "Qwen3ForCausalLM": "chatml",
    "Qwen3MoeForCausalLM": "chatml",
    "BaichuanForCausalLM": "baichuan2",
    "GlmForCausalLM": "glm4",
    "Glm4ForCausalLM": "glm4",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma",
    "Gemma3ForCausalLM": "gemma",
    "Gemma3ForConditionalGeneration": "gemma",
    "FalconForCausalLM": "falcon",
    "RWForCausalLM": "falcon",
    "DeepseekForCausalLM": "deepseek",
    "DeepseekV2ForCausalLM": "deepseek",
    "MultiModalityCausalLM": "deepseek-vl",
    "DbrxForCausalLM": "dbrx",
    "Phi3ForCausalLM": "phi-3",
}
_BY_MODEL_TYPE = {
    "internlm": "internlm",
    "internlm2": "internlm2",
    "internlm3": "internlm2",
    "qwen": "qwen",
    "qwen2": "qwen",
    "qwen2_moe": "qwen",
    "qwen3": "chatml",
    "qwen3_moe": "chatml",
    "glm": "glm4",
    "glm4": "glm4",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "gemma3_text": "gemma",
    "falcon": "falcon",
    "deepseek": "deepseek",
    "deepseek_v2": "deepseek",
    "dbrx": "dbrx",
    "phi3": "phi-3",
}
# What an InternVL config calls its conversation.
_INTERNVL = {
    "internlm2-chat": "internvl-internlm2",
    "Hermes-2": "internvl-zh-hermes2",
    "phi3-chat": "internvl-phi3",
    "internvl2_5": "internvl2_5",
}
# Special tokens that only one way of chatting uses, for architectures that many families share.
_BY_TOKEN = (("<|start_header_id|>", "llama3"), ("<|im_start|>", "chatml"), ("<start_of_turn>", "gemma"))
# What can be changed about a model's own Jinja; any other part asks for a template made of parts.
_JINJA_PARTS = frozenset({"meta_instruction", "stop_words", "capability"})


class UnknownTemplate(ChatTemplate):
    """Stands for the template of a model that brings none and is not recognised: text passes, a chat is refused."""

    name = "unknown"

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture
        self.stop_words = []

    def _render(self, messages: list[Message], options: RenderOptions) -> str:
        raise ConfigError(
            f"this model ({self._architecture}) brings no chat template and none is known for it. Name one with "
            "--chat-template NAME or ChatTemplateConfig(model_name=NAME), 'base' to pass text as it is; `lmdeploy list` "
            "shows the names"
        )


def choose_chat_template(
    path: str | Path,
    tokenizer: Tokenizer,
    hf_config: Mapping[str, Any],
    config: ChatTemplateConfig | str | None = None,
) -> ChatTemplate:
    """The template of a model.

    path: its folder, of which only generation_config.json is read. hf_config: its config.json; empty for a GGUF file.
    config: what the user asked for: a name, a .json file of parts, a .jinja file, or a ChatTemplateConfig; None for the
    model's own. Raises ConfigError for an unknown name, file or part.
    """
    if isinstance(config, str):
        if config.endswith(".jinja"):
            return _make_jinja({"default": _read_text(config)}, tokenizer, {})
        config = ChatTemplateConfig.from_json(config) if config.endswith(".json") else ChatTemplateConfig(config)
    config = config or ChatTemplateConfig()
    parts = {name: value for name, value in asdict(config).items() if value is not None}
    name, source = parts.pop("model_name", None), parts.pop("model_path", None)
    if source is not None:
        from lmdeploy.tokenizer import Tokenizer as OtherTokenizer

        tokenizer = OtherTokenizer(source)
    if name is None:
        return _choose_for_model(Path(path), tokenizer, hf_config, parts)
    if name != "hf":
        return _make_named(name, Path(path), parts)
    if not tokenizer.chat_templates:
        raise ConfigError(f"--chat-template hf asks for the model's own template, but {path} brings none; give a name")
    return _make_jinja(tokenizer.chat_templates, tokenizer, parts)


def _choose_for_model(
    path: Path, tokenizer: Tokenizer, hf_config: Mapping[str, Any], parts: dict[str, Any]
) -> ChatTemplate:
    if parts.get("capability") == "infilling":
        return _make_named("codellama", path, parts)
    if tokenizer.chat_templates and set(parts) <= _JINJA_PARTS:
        return _make_jinja(tokenizer.chat_templates, tokenizer, parts)
    name = guess_template_name(hf_config, tokenizer)
    if name is not None:
        return _make_named(name, path, parts)
    if set(parts) - _JINJA_PARTS or parts.get("capability") in ("completion", "python"):
        return _make_named("custom", path, parts)
    architectures = hf_config.get("architectures") or [tokenizer.model_type or "of unknown architecture"]
    return UnknownTemplate(str(architectures[0]))


# A model needs one kind of template: the other kind's module, and jinja2 with it, is then never loaded.
def _make_jinja(sources: Mapping[str, str], tokenizer: Tokenizer, parts: dict[str, Any]) -> ChatTemplate:
    from lmdeploy.chat_template.jinja import JinjaTemplate

    if set(parts) - _JINJA_PARTS:
        raise ConfigError(
            f"parts {sorted(set(parts) - _JINJA_PARTS)} cannot be changed in a Jinja template, only "
            f"{sorted(_JINJA_PARTS)}; leave model_name out or name a template made of parts"
        )
    return JinjaTemplate(
        sources,
        tokenizer,
        default_system=parts.get("meta_instruction"),
        stop_words=parts.get("stop_words"),
        capability=parts.get("capability", "chat"),
    )


def _make_named(name: str, path: Path, parts: dict[str, Any]) -> ChatTemplate:
    from lmdeploy.chat_template.named import TEMPLATE_ALIASES, make_template

    own = _read_role_ids(path) if TEMPLATE_ALIASES.get(name, name) == "baichuan2" else {}
    return make_template(name, **own, **parts)


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
    # Baichuan-7B, spelled with a capital C, is a base model; its namesakes of model_type baichuan chat.
    named = _BY_ARCHITECTURE.get(architecture) or ("" if architecture else _BY_MODEL_TYPE.get(model_type))
    if named:
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


def _read_role_ids(path: Path) -> dict[str, int]:
    """Baichuan's ids of the two roles, which belong to the checkpoint."""
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    values = json.loads(file.read_text(encoding="utf-8"))
    keys = ("user_token_id", "assistant_token_id")
    return {key: values[key] for key in keys if isinstance(values.get(key), int)}


def _read_text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat template file {file!r} cannot be read: {error}") from error
