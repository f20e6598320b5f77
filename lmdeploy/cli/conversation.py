"""One chat with the model: its messages, the answer that is being made, what it cost. It reads and prints nothing."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lmdeploy.errors import PromptTooLong, RequestError
from lmdeploy.messages import FinishReason, GenerationConfig, Response

if TYPE_CHECKING:
    from lmdeploy.async_engine import AsyncEngine
    from lmdeploy.serve.remote import RemoteEngine


@dataclass
class AnswerStats:
    """What one answer, or the whole session, cost. Times in seconds from the prompt's submission."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0
    finish_reason: FinishReason | None = None

    @property
    def tokens_per_s(self) -> float:
        """Of the answer after its first token; 0 where there is nothing to divide."""
        elapsed = self.total_s - self.first_token_s
        return (self.answer_tokens - 1) / elapsed if self.answer_tokens > 1 and elapsed > 0 else 0.0


class Conversation:
    """Messages so far; `answer` continues them. With `is_chat` False every prompt stands alone, outside any dialogue."""

    def __init__(
        self,
        engine: AsyncEngine | RemoteEngine,
        config: GenerationConfig,
        system: str | None = None,
        is_chat: bool = True,
    ) -> None:
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.last = AnswerStats()
        self.total = AnswerStats()
        self._engine = engine
        self._config = config
        self._is_chat = is_chat

    @property
    def messages(self) -> list[dict[str, str]]:
        """The system text, unless that is left to the template, and the turns, as OpenAI messages."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return head + self.turns

    def reset(self) -> None:
        """Forget the turns; the system text stays."""
        self.turns.clear()

    def drop_answer(self) -> str | None:
        """Take back the last prompt and its answer; returns the prompt, None if there is none."""
        while self.turns:
            turn = self.turns.pop()
            if turn["role"] == "user":
                if self._config.random_seed is not None:
                    self._config = replace(self._config, random_seed=self._config.random_seed + 1)
                return turn["content"]
        return None

    def answer(self, text: str) -> Generator[str]:
        """Ask, and yield the answer piece by piece.

        Closing the iterator, or an interrupt, ends the answer; what came until then stays in the conversation. Raises
        PromptTooLong if the session is full and RequestError for a prompt that the engine refuses: then nothing was asked.
        """
        if not self._is_chat:
            self.turns.clear()
        self.turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for response in self._responses():
                pieces.append(response.text)
                yield response.text
        finally:
            if pieces:
                self.turns.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.turns.pop()

    @property
    def is_full(self) -> bool:
        """Whether the last answer ended because the session has no more room."""
        used = self.last.prompt_tokens + self.last.answer_tokens
        return self.last.finish_reason == "length" and used >= self._engine.client.info.session_len

    def _responses(self) -> Generator[Response]:
        prompt = self.messages if self._is_chat else self.turns[-1]["content"]
        session_len = self._engine.client.info.session_len
        prompt_tokens = len(self._engine.encode(prompt))
        if prompt_tokens >= session_len:
            raise PromptTooLong(f"the conversation has {prompt_tokens} tokens and session_len is {session_len}")
        started = time.monotonic()
        self.last = AnswerStats(prompt_tokens)
        try:
            with closing(self._engine.stream([(prompt, self._config)])) as responses:
                for response in responses:
                    if response.finish_reason == "error":
                        raise RequestError(response.error_message or "the engine refused the prompt")
                    self._count(response, time.monotonic() - started)
                    yield response
        finally:
            self._add_to_total()

    def _count(self, response: Response, elapsed_s: float) -> None:
        last = self.last
        last.first_token_s = last.first_token_s or elapsed_s
        last.total_s = elapsed_s
        last.prompt_tokens = response.input_token_len or last.prompt_tokens  # a server may count better than we can
        last.answer_tokens = response.generate_token_len
        last.cached_tokens = response.cached_tokens
        last.finish_reason = response.finish_reason

    def _add_to_total(self) -> None:
        for name in ("prompt_tokens", "cached_tokens", "answer_tokens", "first_token_s", "total_s"):
            setattr(self.total, name, getattr(self.total, name) + getattr(self.last, name))
