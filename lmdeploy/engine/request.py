"""What the engine is asked and what it answers: token ids in, token ids out. It knows neither text nor devices."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import msgspec
import torch

from lmdeploy.messages import FinishReason


@dataclass
class SamplingParams:
    """How the next token of one request is chosen.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. stop_token_ids end the answer and hold the model's
    own end tokens unless they are to be ignored. logprobs: how many top tokens to report beside the chosen one; None is
    off. return_logits, return_hidden_states: 'all' (prompt too) or 'generation'. prompt_logprobs asks for the
    log-probability of each prompt token given those before it. grammar: what the answer has to be, as llguidance writes it.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    bad_token_ids: tuple[int, ...] = ()
    bad_token_sequences: tuple[tuple[int, ...], ...] = ()
    logit_bias: dict[int, float] = field(default_factory=dict)
    repetition_ngram_size: int = 0
    repetition_ngram_threshold: int = 0
    logprobs: int | None = None
    prompt_logprobs: bool = False
    grammar: str | None = None
    return_logits: Literal["all", "generation"] | None = None
    return_hidden_states: Literal["all", "generation"] | None = None

    @property
    def changes_logits(self) -> bool:
        """Whether a penalty, a bias or a ban changes the model's logits."""
        is_banning = self.bad_token_ids or self.bad_token_sequences or self.min_new_tokens
        is_penalizing = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(is_banning or is_penalizing or self.logit_bias)

    @cached_property
    def is_plain_greedy(self) -> bool:
        """Whether the next token is the largest of the model's own logits, and nothing else is asked for."""
        return not (self.temperature or self.changes_logits or self.wants_report or self.grammar)

    @property
    def wants_hidden_states(self) -> bool:
        """Whether a report needs hidden states, or logits of more than the last position."""
        return bool(self.return_hidden_states or self.prompt_logprobs or self.return_logits == "all")

    @property
    def wants_report(self) -> bool:
        """Whether more than tokens is asked for."""
        return bool(
            self.logprobs is not None or self.prompt_logprobs or self.return_logits or self.return_hidden_states
        )


@dataclass
class Request:
    """One prompt and how to continue it. `cache_salt` separates prefix caches of different users."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    cache_salt: str = ""


class RequestOutput(msgspec.Struct, array_like=True):
    """News of one request since the last output. Made for every token, so of the quickest kind of class there is.

    token_ids: new tokens, the stop token included when it ended the answer. logprobs: one dict (token id -> natural
    log-probability) per new token, the chosen token first. prompt_logprobs: the same for each prompt token but the first,
    once. logits: [n, V] float32, hidden_states: [n, C], in order of position. error: set when finish_reason is 'error'.
    """

    request_id: str
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[dict[int, float]] | None = None
    logits: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None
    error: Exception | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def has_news(self) -> bool:
        """Whether it says more than that a part of a prompt has been computed."""
        return bool(self.token_ids or self.finish_reason) or not (self.logits is None and self.hidden_states is None)
