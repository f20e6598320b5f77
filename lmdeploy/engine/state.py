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


@dataclass(eq=False)
class RequestState:
    """A request, its tokens so far and its blocks.

    token_ids: prompt and known output. num_placeholders: tokens that a step in flight samples and the host does not
    know yet. num_computed_tokens: tokens whose K and V are in the cache, or will be once the steps in flight have run.
    matcher: the place in the request's grammar, if it has one. waits_for_own_token: the next step needs the last token on
    the host (a grammar, multi-token bad words). max_tokens: where the answer ends at the latest, set by the scheduler.
    queued_s, started_s, first_token_s: when it came, was first admitted, and had its first token.
    """

    request: Request
    seed: int
    root: bytes
    prompt_ids: list[int] = field(init=False)
    token_ids: list[int] = field(init=False)
    stop_ids: frozenset[int] = field(init=False)
    waits_for_own_token: bool = field(init=False)
    max_tokens: int = field(init=False)
    num_placeholders: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    num_reported_tokens: int = 0
    steps_in_flight: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_named_blocks: int = 0
    prompt_logprobs: list[dict[int, float]] = field(default_factory=list)
    is_finished: bool = False
    matcher: Matcher | None = None
    queued_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None
    first_token_s: float | None = None

    def __post_init__(self) -> None:
        self.prompt_ids = self.request.prompt_ids
        self.token_ids = list(self.prompt_ids)
        sampling = self.request.sampling
        self.stop_ids = frozenset(sampling.stop_token_ids)
        self.waits_for_own_token = self.matcher is not None or bool(sampling.bad_token_sequences)
        self.max_tokens = len(self.prompt_ids) + sampling.max_new_tokens

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Known tokens and those in flight."""
        return len(self.token_ids) + self.num_placeholders

    @property
    def num_output_tokens(self) -> int:
        """Known output tokens and those in flight."""
        return self.num_tokens - len(self.prompt_ids)

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

    def output(
        self,
        token_ids: list[int] | None = None,
        finish_reason: FinishReason | None = None,
        error: Exception | None = None,
    ) -> RequestOutput:
        """An output of this request with its counters filled in."""
        output = RequestOutput(
            self.request.request_id, token_ids or [], finish_reason, len(self.prompt_ids), self.num_cached_tokens or 0
        )
        output.error = error
        return output
