"""The formats of tool calls and of reasoning by name, and which one a model has. It parses nothing itself."""

from __future__ import annotations

from collections.abc import Mapping

from lmdeploy.errors import ConfigError
from lmdeploy.serve.parsers.harmony import HarmonyParser
from lmdeploy.serve.parsers.json_formats import (
    DeepSeekParser,
    HermesParser,
    InternLM2Parser,
    Llama3Parser,
    MistralParser,
)
from lmdeploy.serve.parsers.tag_formats import DeepSeekV32Parser, GlmParser, Qwen3CoderParser
from lmdeploy.serve.parsers.tools import ToolParser

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "qwen": HermesParser,
    "qwen2d5": HermesParser,
    "qwen3": HermesParser,
    "hermes": HermesParser,
    "qwen3coder": Qwen3CoderParser,
    "internlm": InternLM2Parser,
    "internlm2": InternLM2Parser,
    "intern-s1": InternLM2Parser,
    "llama3": Llama3Parser,
    "mistral": MistralParser,
    "deepseek": DeepSeekParser,
    "deepseek-v3": DeepSeekParser,
    "deepseek-v32": DeepSeekV32Parser,
    "deepseek-v3.2": DeepSeekV32Parser,
    "glm": GlmParser,
    "glm45": GlmParser,
    "glm47": GlmParser,
    "gpt-oss": HarmonyParser,
}

# Whether the thoughts begin without `<think>` where the prompt says nothing; None: Harmony, which has channels.
REASONING_PARSERS: dict[str, bool | None] = {
    "default": False,
    "qwen3": False,
    "glm": False,
    "glm45": False,
    "intern-s1": False,
    "deepseek-v3": False,
    "deepseek-v32": False,
    "deepseek-v4": False,
    "qwen-qwq": True,
    "deepseek-r1": True,
    "gpt-oss": None,
}

# What only one format has in its chat template, or among its special tokens; the first that is found counts.
_TOOL_SIGNS = (
    ("<|channel|>", "gpt-oss"),
    ("<function=", "qwen3coder"),
    ("｜DSML｜", "deepseek-v32"),
    ("<｜tool▁calls▁begin｜>", "deepseek"),
    ("<arg_key>", "glm"),
    ("<tool_call>", "qwen"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|plugin|>", "internlm2"),
    ("<|python_tag|>", "llama3"),
)
_REASONING_SIGNS = (("<|channel|>", "gpt-oss"), ("</think>", "default"))
AUTO, NONE = "auto", "none"


def guess_tool_parser(signs: str) -> str | None:
    """The format of a model. signs: its chat template and its special tokens."""
    return next((name for sign, name in _TOOL_SIGNS if sign in signs), None)


def guess_reasoning_parser(signs: str) -> str | None:
    return next((name for sign, name in _REASONING_SIGNS if sign in signs), None)


def pick(flag: str, name: str | None, table: Mapping[str, object], guess: str | None = None) -> str | None:
    """The format that a flag names; `guess` for 'auto' or None, None for 'none'. Raises ConfigError for any other name."""
    if name is None or name == AUTO:
        return guess
    if name == NONE:
        return None
    if name not in table:
        raise ConfigError(f"{flag} {name!r} is not known; use auto, none, or one of {', '.join(table)}")
    return name
