"""What the engine remembers of one request while it lives. It decides nothing; the scheduler does."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmdeploy.engine.block_manager import block_hash
from lmdeploy.engine.request import Request, RequestOutput
from lmdeploy.messages import FinishReason

if TYPE_CHECKING:
    from lmdeploy.engine.guided import Matcher

INVALID_TOKEN = -1  # sampled where no logit was finite


@dataclass(eq=False, slots=True)
class RequestState:
    """A request, its tokens so far and its blocks.

    token_ids: prompt and known output. num_computed_tokens: tokens whose K and V are in the cache, or will be once the steps
    in flight have run; those that token_ids lacks are still to be told by such a step. last_step: the scheduler's number of
    the last step that may write to its blocks, once it has lost them. matcher: the place in the request's grammar, if it has
    one. end_ids: tokens that may end it. has_other_ends: so may any other token. waits_for_own_token: the next step needs
    the last token on the host (a grammar, multi-token bad words). max_tokens: where the answer ends at the latest, set by
    the scheduler. queued_s, started_s, first_token_s: when it came, was first admitted, and had its first token.
    """

    request: Request
    seed: int
    root: bytes
    request_id: str = field(init=False)
    prompt_ids: list[int] = field(init=False)
    token_ids: list[int] = field(init=False)
    end_ids: frozenset[int] = field(init=False)
    has_other_ends: bool = field(init=False)
    waits_for_own_token: bool = field(init=False)
    max_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    is_finished: bool = False
    num_cached_tokens: int | None = None
    num_reported_tokens: int = 0
    last_step: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_named_blocks: int = 0
    prompt_logprobs: list[dict[int, float]] = field(default_factory=list)
    matcher: Matcher | None = None
    queued_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None
    first_token_s: float | None = None

    def __post_init__(self) -> None:
        self.request_id = self.request.request_id
        self.prompt_ids = self.request.prompt_ids
        self.token_ids = list(self.prompt_ids)
        sampling = self.request.sampling
        self.end_ids = frozenset((*sampling.stop_token_ids, INVALID_TOKEN))
        self.has_other_ends = self.matcher is not None or sampling.repetition_ngram_size > 0
        self.waits_for_own_token = self.matcher is not None or bool(sampling.bad_token_sequences)
        self.max_tokens = len(self.prompt_ids) + sampling.max_new_tokens

    @property
    def num_tokens(self) -> int:
        """Known tokens and those in flight."""
        return max(len(self.token_ids), self.num_computed_tokens + 1)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def wants_every_position(self) -> bool:
        """Whether the prompt must really be computed, because something is reported for each of its positions."""
        sampling = self.request.sampling
        return sampling.prompt_logprobs or "all" in (sampling.return_logits, sampling.return_hidden_states)

    def full_hashes(self, block_size: int) -> list[bytes]:
        """Hashes of all blocks that known tokens fill, extended as tokens arrive."""
        for index in range(len(self.block_hashes), len(self.token_ids) // block_size):
            parent = self.block_hashes[-1] if self.block_hashes else self.root
            self.block_hashes.append(block_hash(parent, self.token_ids[index * block_size : (index + 1) * block_size]))
        return self.block_hashes

    def output(self, token_ids: list[int], finish_reason: FinishReason | None) -> RequestOutput:
        """An output of this request with its counters filled in."""
        return RequestOutput(
            self.request_id, token_ids, finish_reason, len(self.prompt_ids), self.num_cached_tokens or 0
        )
