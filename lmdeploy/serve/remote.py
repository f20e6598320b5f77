"""A server as an engine: chats through its /v1/chat/completions. It knows neither terminals nor pages.

RemoteEngine has the part of AsyncEngine's face that a chat needs, so that chats run over either.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from lmdeploy.errors import ConfigError, RequestError
from lmdeploy.messages import GenerationConfig, Response
from lmdeploy.serve.openai.api_client import APIClient, ServerError

# Fields of GenerationConfig that a request may bear, under the request's name.
_FIELDS = {
    "max_new_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "random_seed": "seed", "stop_words": "stop",
}  # fmt: skip
_DEFAULTS = GenerationConfig()


@dataclass(frozen=True)
class RemoteInfo:
    """session_len: tokens of prompt and answer together; a server that does not tell is taken to have no limit."""

    session_len: int


@dataclass(frozen=True)
class RemoteClient:
    info: RemoteInfo


class RemoteEngine:
    """One model of a server. Owns the APIClient that it is given."""

    def __init__(self, api: APIClient, model_name: str | None = None) -> None:
        """model_name: the server's first model by default. Raises ServerError, and ConfigError for a name it has not."""
        cards = {str(card["id"]): card for card in api.model_cards()}
        if not cards or (model_name is not None and model_name not in cards):
            raise ConfigError(f"{api.api_server_url} serves {', '.join(cards) or 'no model'}, not {model_name!r}")
        self.model_name = model_name or next(iter(cards))
        self.client = RemoteClient(RemoteInfo(cards[self.model_name].get("max_model_len") or sys.maxsize))
        self._api = api
        self._can_count = True

    def encode(self, prompt: str | Sequence[Any]) -> list[int]:
        """The prompt's token ids; none where the server has no /tokenize. Raises RequestError for what it refuses."""
        if not self._can_count:
            return []
        try:
            answer = self._api.post("/tokenize", {"model": self.model_name, "messages": _messages(prompt)})
        except ServerError as error:
            if error.status not in (404, 405, 501):
                raise
            self._can_count = False
            return []
        return list(answer.get("tokens") or [])

    def stream(self, prompts: Iterable[tuple[Any, GenerationConfig | None]]) -> Generator[Response, None, None]:
        """What is new of each answer, one prompt after the other; Response.index counts them.

        Thoughts that the server tells apart come as `<think>...</think>` before the text. What the server refuses, and a
        server that fails, give a Response with finish_reason 'error'.
        """
        for index, (prompt, config) in enumerate(prompts):
            fields: dict[str, Any] = {**request_fields(config or _DEFAULTS), "stream_options": {"include_usage": True}}
            chunks = self._api.chat_completions_v1(self.model_name, _messages(prompt), stream=True, **fields)
            try:
                with closing(_responses(chunks, index)) as responses:
                    yield from responses
            except (RequestError, ServerError) as error:
                code = error.status or 503 if isinstance(error, ServerError) else 400
                yield Response(index=index, finish_reason="error", error_code=code, error_message=str(error))

    def close(self) -> None:
        self._api.close()


def request_fields(config: GenerationConfig) -> dict[str, Any]:
    """The fields of a request that asks for this; what the config leaves open, the server chooses."""
    values = {name: getattr(config, field) for field, name in _FIELDS.items()}
    fields = {name: value for name, value in values.items() if value is not None}
    if config.repetition_penalty == _DEFAULTS.repetition_penalty:
        del fields["repetition_penalty"]  # not every server knows it
    return {**fields, "temperature": 0} if config.do_sample is False else fields


def _messages(prompt: str | Sequence[Any]) -> list[Any]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _responses(chunks: Generator[dict[str, Any], None, None], index: int) -> Generator[Response, None, None]:
    """Chunks as Responses. Until the usage comes in the end, every chunk with text counts as one token."""
    count, reason, is_thinking = 0, None, False
    usage: dict[str, Any] = {}
    with closing(chunks):
        for chunk in chunks:
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices") or []:
                delta = choice.get("delta") or {}
                reason = choice.get("finish_reason") or reason
                thought, text = delta.get("reasoning_content") or "", delta.get("content") or ""
                shown = ("" if is_thinking or not thought else "<think>\n") + thought
                shown += ("\n</think>\n\n" if (is_thinking or thought) and text else "") + text
                is_thinking = (is_thinking or bool(thought)) and not text
                if shown:
                    count += 1
                    yield Response(shown, count, index=index)
    yield Response(
        text="\n</think>\n" if is_thinking else "",
        generate_token_len=usage.get("completion_tokens", count),
        input_token_len=usage.get("prompt_tokens", 0),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        finish_reason="length" if reason == "length" else "stop",
        index=index,
    )
