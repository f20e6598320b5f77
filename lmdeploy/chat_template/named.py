"""The named chat templates, as data, and the decorator by which users add theirs. It chooses none."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lmdeploy.chat_template.base import ChatTemplate
from lmdeploy.chat_template.turns import InfillingTemplate, TokenIdTemplate, TurnTemplate
from lmdeploy.errors import ConfigError

TemplateSource = Callable[..., ChatTemplate]
_Source = TypeVar("_Source", bound=TemplateSource)

# The system texts that the models' own code puts first when the user gives none.
_QWEN_SYSTEM = "You are a helpful assistant."
_INTERNVL_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_DEEPSEEK_VL_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

_CHATML: dict[str, Any] = {
    "system": "<|im_start|>system\n",
    "eosys": "<|im_end|>\n",
    "user": "<|im_start|>user\n",
    "eoh": "<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n",
    "eoa": "<|im_end|>\n",
    "stop_words": ["<|im_end|>"],
}
_CHATML_CLOSE = _CHATML | {"eosys": "<|im_end|>", "eoh": "<|im_end|>", "eoa": "<|im_end|>"}
_INTERNLM2 = _CHATML | {
    "tool": "<|im_start|>environment\n",
    "eotool": "<|im_end|>\n",
    "plugin": "<|im_start|>system name=<|plugin|>\n",
    "eoplugin": "<|im_end|>\n",
    "stop_words": ["<|im_end|>", "<|action_end|>"],
}
_XCOMPOSER2 = {
    name: text.replace("<|im_start|>", "[UNUSED_TOKEN_146]").replace("<|im_end|>", "[UNUSED_TOKEN_145]")
    for name, text in _CHATML.items()
    if name != "stop_words"
}
_PHI3: dict[str, Any] = {
    "system": "<|system|>\n",
    "eosys": "<|end|>\n",
    "user": "<|user|>\n",
    "eoh": "<|end|>\n",
    "assistant": "<|assistant|>\n",
    "eoa": "<|end|>\n",
    "stop_words": ["<|end|>"],
}
_PHI3_CLOSE = _PHI3 | {"eosys": "<|end|>", "eoh": "<|end|>", "eoa": "<|end|>"}
_GLM_ROLES: dict[str, Any] = {
    "system": "<|system|>\n",
    "user": "<|user|>\n",
    "assistant": "<|assistant|>\n",
    "tool": "<|observation|>\n",
    "stop_words": ["<|user|>", "<|observation|>"],
}
_LLAMA2: dict[str, Any] = {
    "bos": "<s>",
    "system": "<<SYS>>\n",
    "eosys": "\n<</SYS>>\n\n",
    "user": "[INST] ",
    "eoh": " [/INST]",
    "assistant": " ",
    "eoa": " </s>",
    "separator": "<s>",
    "system_in_user": True,
}
_DEEPSEEK: dict[str, Any] = {
    "eosys": "\n\n",
    "user": "User: ",
    "eoh": "\n\n",
    "assistant": "Assistant: ",
    "eoa": "<｜end▁of▁sentence｜>",
}
_VICUNA: dict[str, Any] = {
    "meta_instruction": _VICUNA_SYSTEM,
    "eosys": " ",
    "user": "USER: ",
    "eoh": " ",
    "assistant": "ASSISTANT: ",
    "eoa": "</s>",
    "stop_words": ["</s>"],
}
_LLAMA3_TURN = "<|start_header_id|>{}<|end_header_id|>\n\n"

# Text around the turns by template name.
_TURNS: dict[str, dict[str, Any]] = {
    "base": {"capability": "completion"},
    "custom": {},
    "chatml": _CHATML,
    "internlm": {
        "bos": "<s>",
        "system": "<|System|>:",
        "eosys": "\n",
        "user": "<|User|>:",
        "eoh": "<eoh>\n",
        "assistant": "<|Bot|>:",
        "eoa": "<eoa>\n",
        "bos_each_turn": True,
        "stop_words": ["<eoa>"],
    },
    "internlm2": _INTERNLM2 | {"bos": "<s>"},
    "internlm-xcomposer2": _XCOMPOSER2 | {"stop_words": ["[UNUSED_TOKEN_145]"]},
    "internvl-internlm2": _CHATML_CLOSE | {"meta_instruction": _INTERNVL_SYSTEM},
    "internvl-zh-hermes2": _CHATML_CLOSE | {"meta_instruction": _INTERNVL_SYSTEM},
    "internvl-phi3": _PHI3_CLOSE | {"meta_instruction": _INTERNVL_SYSTEM},
    "internvl2_5": _CHATML | {"meta_instruction": _INTERNVL_SYSTEM},
    "qwen": _CHATML | {"meta_instruction": _QWEN_SYSTEM},
    "yi": _CHATML | {"stop_words": ["<|im_end|>", "<|endoftext|>"]},
    "dbrx": _CHATML,
    "llava-chatml": _CHATML_CLOSE,
    "chatglm": {
        "eosys": "\n\n",
        "user": "[Round {round}]\n\n问：",
        "eoh": "\n\n",
        "assistant": "答：",
        "eoa": "\n\n",
    },
    "chatglm3": _GLM_ROLES
    | {
        "system": "<|system|>\n ",
        "user": "<|user|>\n ",
        "assistant": "<|assistant|>\n ",
        "tool": "<|observation|>\n ",
    },
    "glm4": _GLM_ROLES,
    "llama2": _LLAMA2,
    "llama3": {
        "bos": "<|begin_of_text|>",
        "system": _LLAMA3_TURN.format("system"),
        "eosys": "<|eot_id|>",
        "user": _LLAMA3_TURN.format("user"),
        "eoh": "<|eot_id|>",
        "assistant": _LLAMA3_TURN.format("assistant"),
        "eoa": "<|eot_id|>",
        "tool": _LLAMA3_TURN.format("ipython"),
        "eotool": "<|eot_id|>",
        "stop_words": ["<|eot_id|>", "<|eom_id|>"],
    },
    "mistral": {
        "bos": "<s>",
        "eosys": "\n\n",
        "user": "[INST] ",
        "eoh": " [/INST]",
        "assistant": " ",
        "eoa": "</s>",
        "system_in_user": True,
    },
    "gemma": {
        "bos": "<bos>",
        "eosys": "\n\n",
        "user": "<start_of_turn>user\n",
        "eoh": "<end_of_turn>\n",
        "assistant": "<start_of_turn>model\n",
        "eoa": "<end_of_turn>\n",
        "system_in_user": True,
        "stop_words": ["<end_of_turn>"],
    },
    "phi-3": _PHI3,
    "deepseek": _DEEPSEEK,
    "deepseek-vl": _DEEPSEEK | {"meta_instruction": _DEEPSEEK_VL_SYSTEM},
    "falcon": {},
    "vicuna": _VICUNA,
    "llava-v1": _VICUNA,
}

CHAT_TEMPLATES: dict[str, TemplateSource] = {
    name: partial(TurnTemplate, name=name, **parts) for name, parts in _TURNS.items()
}
CHAT_TEMPLATES["baichuan2"] = partial(
    TokenIdTemplate,
    name="baichuan2",
    user="<reserved_106>",
    assistant="<reserved_107>",
    user_token_id=195,
    assistant_token_id=196,
)
CHAT_TEMPLATES["codellama"] = partial(
    InfillingTemplate,
    name="codellama",
    **_LLAMA2,
    prefix_token="<PRE>",
    suffix_token="<SUF>",
    middle_token="<MID>",
    end_token="<EOT>",
)

# LMDeploy's other names for the same templates, those of version 0.1 among them.
_ALIASES = {
    "base": "llama internlm-7b internlm-20b internlm2-1_8b internlm2-7b internlm2-20b baichuan-7b",
    "internlm": "internlm-chat internlm-chat-7b internlm-chat-7b-8k internlm-chat-20b",
    "internlm2": "internlm2-chat internlm2-chat-1_8b internlm2-chat-7b internlm2-chat-20b internlm2_5 internlm3",
    "internlm-xcomposer2": "internlm-xcomposer2d5 internlm-xcomposer2-4khd",
    "internvl-internlm2": "internvl2-internlm2",
    "internvl-zh-hermes2": "internvl-zh",
    "internvl-phi3": "internvl2-phi3",
    "qwen": "qwen-7b qwen-14b qwen2 qwen2d5",
    "chatml": "qwen3",
    "yi": "yi-chat yi-200k yi-34b",
    "baichuan2": "baichuan2-7b baichuan2-13b",
    "chatglm": "chatglm2 chatglm2-6b",
    "glm4": "codegeex4",
    "llama2": "llama-2 llama-2-chat",
    "llama3": "llama-3 llama3_1 llama3_2",
    "mistral": "mixtral",
    "phi-3": "phi3",
    "deepseek": "deepseek-chat",
    "vicuna": "wizardlm",
}
TEMPLATE_ALIASES: dict[str, str] = {alias: name for name, aliases in _ALIASES.items() for alias in aliases.split()}


def register_chat_template(*names: str) -> Callable[[_Source], _Source]:
    """Class decorator that adds a template under these names, over any of the same name.

    The class is called with the parts that the user overrides as keyword arguments, none by default.
    """

    def register(source: _Source) -> _Source:
        for name in names:
            CHAT_TEMPLATES[name] = source
        return source

    return register


def find_template(name: str) -> TemplateSource | None:
    """The template of a name or alias, None if there is none."""
    return CHAT_TEMPLATES.get(name) or CHAT_TEMPLATES.get(TEMPLATE_ALIASES.get(name, ""))


def make_template(name: str, **parts: Any) -> ChatTemplate:
    """A named template with some parts replaced; raises ConfigError for an unknown name or part."""
    source = find_template(name)
    if source is None:
        known = ", ".join(sorted(CHAT_TEMPLATES))
        raise ConfigError(
            f"chat template {name!r} is unknown; known are {known}, 'hf' for the model's own Jinja, or a .json or .jinja file"
        )
    try:
        return source(**parts)
    except TypeError as error:
        raise ConfigError(f"chat template {name!r} does not take these parts: {error}") from error


def make_for_model(name: str, path: Path, **parts: Any) -> ChatTemplate:
    """make_template with what the model's folder says of it."""
    own = _read_role_ids(path) if TEMPLATE_ALIASES.get(name, name) == "baichuan2" else {}
    return make_template(name, **own, **parts)


def _read_role_ids(path: Path) -> dict[str, int]:
    """Baichuan's ids of the two roles, which belong to the checkpoint; `path` is its folder."""
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    values = json.loads(file.read_text(encoding="utf-8"))
    keys = ("user_token_id", "assistant_token_id")
    return {key: values[key] for key in keys if isinstance(values.get(key), int)}
