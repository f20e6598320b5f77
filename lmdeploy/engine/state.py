"""What the engine remembers of one request while it lives. It decides nothing; the scheduler does."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmdeploy.engine.block_manager import block_hash
from lmdeploy.engine.request import Request, RequestOutput


@dataclass(eq=False)
class RequestState:
    """A request, its tokens so far and its blocks.

    token_ids: prompt and known output. num_placeholders: tokens that a step in flight samples and the host does not
    know yet. num_computed_tokens: tokens whose K and V are in the cache, or will be once the steps in flight have run.
    """

    request: Request
    seed: int
    root: bytes
    prompt_ids: list[int] = field(init=False)
    token_ids: list[int] = field(init=False)
    stop_ids: frozenset[int] = field(init=False)
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

    def __post_init__(self) -> None:
        self.prompt_ids = self.request.prompt_ids
        self.token_ids = list(self.prompt_ids)
        self.stop_ids = frozenset(self.request.sampling.stop_token_ids)

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

    @property
    def waits_for_own_token(self) -> bool:
        """Whether the next step needs the last token on the host (multi-token bad words)."""
        return bool(self.request.sampling.bad_token_sequences)

    def full_hashes(self, block_size: int) -> list[bytes]:
        """Hashes of all blocks that known tokens fill, extended as tokens arrive."""
        for index in range(len(self.block_hashes), len(self.token_ids) // block_size):
            parent = self.block_hashes[-1] if self.block_hashes else self.root
            self.block_hashes.append(block_hash(parent, self.token_ids[index * block_size : (index + 1) * block_size]))
        return self.block_hashes

    def output(self, **values: object) -> RequestOutput:
        """An output of this request with its counters filled in."""
        return RequestOutput(
            self.request_id,
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=self.num_cached_tokens or 0,
            **values,  # type: ignore[arg-type]
        )
