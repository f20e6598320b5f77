"""The token counts at the end of an answer. It knows no endpoint."""

from __future__ import annotations

from typing import Any

from lmdeploy.messages import Response


class Usage:
    """Counts over the answers of one HTTP request; `n` answers share a prompt, which counts once."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._prompt: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._completion: dict[int, int] = {}
        self._num_reasoning_tokens = 0

    def add(self, response: Response) -> None:
        number = response.index // self._n
        self._prompt[number] = response.input_token_len
        self._cached[number] = max(self._cached.get(number, 0), response.cached_tokens)
        self._completion[response.index] = response.generate_token_len

    def add_reasoning(self, num_tokens: int) -> None:
        """Tokens of thoughts in one of the answers."""
        self._num_reasoning_tokens += num_tokens

    def body(self) -> dict[str, Any]:
        prompt, completion = sum(self._prompt.values()), sum(self._completion.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
            "completion_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
        }
