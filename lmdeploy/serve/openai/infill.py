"""A prompt for what stands between two texts, for models that have tokens for that. It knows no endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmdeploy.async_engine import Prompt
from lmdeploy.errors import InvalidParameter
from lmdeploy.tokenizer import Tokenizer

# The tokens before the first text, between the two, and after the second. Of Qwen2.5-Coder and CodeGemma, StarCoder,
# DeepSeek-Coder.
_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


def infill_prompts(tokenizer: Tokenizer, prompts: Sequence[Prompt], suffix: str) -> list[Prompt]:
    """The ids that ask for the text between each prompt and the suffix. Raises InvalidParameter where no model could."""
    before, between, after = _ids(tokenizer)
    end = tokenizer.encode(suffix, add_special_tokens=False)
    start = tokenizer.encode("")

    def one(prompt: Prompt) -> list[Any]:
        ids = tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt
        return [*start, before, *ids, between, *end, after]

    return [one(prompt) for prompt in prompts]


def _ids(tokenizer: Tokenizer) -> list[int]:
    for names in _TOKENS:
        ids = [found for name in names if (found := tokenizer.token_to_id(name)) is not None]
        if len(ids) == len(names):
            return ids
    raise InvalidParameter("suffix: this model has no tokens for filling in between two texts; leave it out")
