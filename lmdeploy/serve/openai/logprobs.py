"""Log-probabilities as the two endpoints spell them: tokens as text, numbers that JSON can hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lmdeploy.tokenizer import Tokenizer

# JSON knows no infinity.
_LOWEST = -9999.0


def chat_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[dict[int, float]], count: int
) -> dict[str, Any]:
    """The `logprobs` of a chat choice. count: how many top tokens beside each."""
    content = []
    for token, values in zip(ids, logprobs, strict=True):
        entry = _entry(tokenizer, token, values.get(token, _LOWEST))
        entry["top_logprobs"] = [_entry(tokenizer, *item) for item in _top(values, count)]
        content.append(entry)
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    logprobs: Sequence[dict[int, float] | None],
    count: int,
    offset: int = 0,
) -> dict[str, Any]:
    """The `logprobs` of a completion choice. A token without any has null. offset: where the first token's text begins."""
    tokens, offsets, own, top = [], [], [], []
    for token, values in zip(ids, logprobs, strict=True):
        text = token_text(tokenizer, token)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        own.append(None if values is None else max(values.get(token, _LOWEST), _LOWEST))
        top.append(
            None if values is None else _named(tokenizer, [*_top(values, count), (token, values.get(token, _LOWEST))])
        )
    return {"tokens": tokens, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_to_bytes(token).decode("utf-8", "replace")


def _entry(tokenizer: Tokenizer, token: int, value: float) -> dict[str, Any]:
    spelled = tokenizer.token_to_bytes(token)
    return {"token": spelled.decode("utf-8", "replace"), "bytes": list(spelled), "logprob": max(value, _LOWEST)}


def _top(values: dict[int, float], count: int) -> list[tuple[int, float]]:
    """The most probable first; the chosen token is among `values` even where it is none of them."""
    return sorted(values.items(), key=lambda item: -item[1])[:count]


def _named(tokenizer: Tokenizer, items: Iterable[tuple[int, float]]) -> dict[str, float]:
    """By text; of tokens that read alike, such as halves of a character, the most probable."""
    named: dict[str, float] = {}
    for token, value in items:
        text = token_text(tokenizer, token)
        named[text] = max(value, named.get(text, _LOWEST))
    return named
