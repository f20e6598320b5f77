"""Prompts for load: random words of a length, lengths spread as in chats, or those of a file. It knows no server.

Words are short and common, so that nearly every tokenizer has one token for each; what a prompt really has, the server's
`usage` tells.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdeploy.errors import ConfigError

_WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part over new "
    "sound take only little work know place year live me back give most very after thing our just name good man think "
    "say great where help through much before line right too mean old any same tell boy follow came want show also "
    "around form three small set put end does another well large must big even such because turn here why ask went "
    "men read need land"
)
_TOKENS_PER_WORD = 1.3  # of running English text, for what a file gives as text only
_CHAT_SPREAD = (1.4, 1.07)  # of the logarithms of prompts' and answers' lengths in ShareGPT
_MAX_CHAT_FACTOR = 6.0  # lengths beyond this multiple of the mean are cut, as benchmarks over ShareGPT do


@dataclass(frozen=True)
class Ask:
    """One request. prompt: a text, or a chat's messages. max_tokens: of the answer."""

    prompt: str | list[dict[str, Any]]
    max_tokens: int

    def text(self) -> str:
        """For an endpoint without roles."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(str(message.get("content") or "") for message in self.prompt)

    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt


def random_asks(count: int, prompt_tokens: int, output_tokens: int, generator: random.Random) -> list[Ask]:
    """Prompts of one length, and answers of one."""
    return [Ask(_words(prompt_tokens, generator), output_tokens) for _ in range(count)]


def chat_like_asks(count: int, prompt_tokens: int, output_tokens: int, generator: random.Random) -> list[Ask]:
    """Lengths with these means, log-normal with the spread of ShareGPT's first turns: many short ones, few very long."""

    def length(mean: int, spread: float) -> int:
        drawn = generator.lognormvariate(math.log(mean) - spread * spread / 2, spread)
        return max(1, round(min(drawn, _MAX_CHAT_FACTOR * mean)))

    asks = []
    for _ in range(count):
        sizes = length(prompt_tokens, _CHAT_SPREAD[0]), length(output_tokens, _CHAT_SPREAD[1])
        asks.append(Ask(_words(sizes[0], generator), sizes[1]))
    return asks


def file_asks(path: Path, count: int, output_tokens: int | None, generator: random.Random) -> list[Ask]:
    """Drawn from a file, again and again where it holds fewer than `count`.

    The file is a ShareGPT list (`conversations` of `from` and `value`: the first prompt, an answer as long as the one
    there), or has one object a line with `prompt` or `messages`, and `max_tokens` if it likes. output_tokens: of every
    answer, whatever the file says. Raises ConfigError.
    """
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text) if text.lstrip().startswith("[") else [*_lines(text)]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompts of {path}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is neither a JSON list nor one JSON object a line: {error}") from error
    asks = [ask for entry in entries if (ask := _read_entry(entry, output_tokens)) is not None]
    if not asks:
        raise ConfigError(f"{path} holds no prompt: give `prompt`, `messages` or ShareGPT's `conversations`")
    generator.shuffle(asks)
    return [asks[number % len(asks)] for number in range(count)]


def _lines(text: str) -> Iterator[Any]:
    return (json.loads(line) for line in text.splitlines() if line.strip())


def _read_entry(entry: Any, output_tokens: int | None) -> Ask | None:
    """The request of an entry; None for one without a prompt."""
    if not isinstance(entry, dict):
        return None
    turns = entry.get("conversations")
    if isinstance(turns, list):
        values = [str(turn.get("value") or "") for turn in turns if isinstance(turn, dict)]
        if len(values) < 2 or not all(values[:2]):
            return None
        return Ask(values[0], output_tokens or max(1, round(len(values[1].split()) * _TOKENS_PER_WORD)))
    prompt = entry.get("messages") or entry.get("prompt")
    is_chat = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
    given = entry.get("max_tokens")
    wanted = given if isinstance(given, int) and given > 0 else 128
    return Ask(prompt, output_tokens or wanted) if prompt and (is_chat or isinstance(prompt, str)) else None


def _words(count: int, generator: random.Random) -> str:
    return " ".join(generator.choices(_WORDS.split(), k=count))
