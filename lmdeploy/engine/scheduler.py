"""Which request computes how many tokens in the next step, and what a finished step means for each.

There is no prefill phase and no decode phase: a request is scheduled `num_tokens - num_computed_tokens` tokens under
one token budget. Chunked prefill, prefix hits and decode are that one subtraction. It holds no tensor.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from dataclasses import dataclass

from lmdeploy.engine.block_manager import BlockManager
from lmdeploy.engine.finish import finish_reason
from lmdeploy.engine.request import RequestOutput
from lmdeploy.engine.state import RequestState
from lmdeploy.messages import FinishReason


@dataclass(slots=True)
class Scheduled:
    """`num_tokens` tokens of one request, from position `start`; the last of them samples if `samples`."""

    state: RequestState
    start: int
    num_tokens: int
    samples: bool


@dataclass
class StepPlan:
    """One step of the device."""

    scheduled: list[Scheduled]


Wanted = tuple[RequestState, int]
News = tuple[RequestState, list[int], FinishReason | None]


class Scheduler:
    """Admits, grows, preempts and finishes requests. Oldest first; the youngest gives way."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_batch_size: int,
        max_tokens_per_step: int,
        session_len: int,
        enable_prefix_caching: bool,
    ) -> None:
        self.blocks = blocks
        self.max_batch_size = max_batch_size
        self.max_tokens_per_step = max_tokens_per_step
        self.session_len = session_len
        self.enable_prefix_caching = enable_prefix_caching
        self.waiting: deque[RequestState] = deque()
        self.running: list[RequestState] = []
        self.num_preemptions = 0
        self._retiring: list[RequestState] = []

    def add(self, state: RequestState) -> None:
        state.max_tokens = min(len(state.prompt_ids) + state.request.sampling.max_new_tokens, self.session_len)
        self.waiting.append(state)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._retiring)

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can be computed now."""
        scheduled: list[Scheduled] = []
        budget = self.max_tokens_per_step
        # Decodes first: a long prompt must not hold them up. Only a decode can need new blocks (a prompt got all of its
        # own at admission), so a preempted request is never one that this step has already scheduled. Without blocks a
        # request has been preempted since the loop began.
        decodes, prompts = self._split_running()
        for state, wanted in itertools.chain(decodes, prompts):
            num_tokens = min(wanted, budget)
            if num_tokens > 0 and state.block_table and self._grow(state, num_tokens):
                scheduled.append(self._commit(state, num_tokens))
                budget -= num_tokens
        while budget and self.waiting and len(self.running) < self.max_batch_size:
            state = self.waiting[0]
            if state.steps_in_flight or not self._admit(state):
                break
            self.running.append(self.waiting.popleft())
            num_tokens = min(self._num_schedulable(state), budget)
            scheduled.append(self._commit(state, num_tokens))
            budget -= num_tokens
        return StepPlan(scheduled) if scheduled else None

    def update(self, entries: list[Scheduled], tokens: list[int | None]) -> list[News]:
        """Take a finished step's tokens, one per scheduled entry (None where it does not sample).

        Returns, for each request that lives, its new tokens and why it ended, if it did. Tokens of requests that ended
        while the step ran are dropped.
        """
        news = []
        for entry, token in zip(entries, tokens, strict=True):
            state = entry.state
            state.steps_in_flight -= 1
            if state.is_finished:
                continue
            if token is not None:
                state.num_placeholders -= 1
                state.token_ids.append(token)
            end = entry.start + entry.num_tokens
            if self.enable_prefix_caching:
                self._name_full_blocks(state, end)
            is_scored = state.request.sampling.max_new_tokens == 0 and end == len(state.prompt_ids)
            reason = "length" if is_scored else finish_reason(state, self.session_len) if token is not None else None
            if reason is not None:
                self.finish(state)
            news.append((state, [] if token is None else [token], reason))
        self._release_retired()
        return news

    def finish(self, state: RequestState) -> None:
        """Take a request out; its blocks return when the last step that touches them has ended."""
        state.is_finished = True
        if state in self.running:
            self.running.remove(state)
        elif state in self.waiting:
            self.waiting.remove(state)
        self._retiring.append(state)
        self._release_retired()

    def abort_all(self) -> list[RequestOutput]:
        """End every request; one output for each."""
        states = [*self.running, *self.waiting]
        for state in states:
            self.finish(state)
        return [state.output(finish_reason="abort") for state in states]

    def _split_running(self) -> tuple[list[Wanted], list[Wanted]]:
        """Running requests with the tokens that each could compute now: those with one, and those with more."""
        decodes: list[Wanted] = []
        prompts: list[Wanted] = []
        for state in self.running:
            wanted = self._num_schedulable(state)
            if wanted == 1:
                decodes.append((state, 1))
            elif wanted:
                prompts.append((state, wanted))
        return decodes, prompts

    def _num_schedulable(self, state: RequestState) -> int:
        """The one subtraction, and nothing past the last token that may be sampled."""
        num_tokens = len(state.token_ids) + state.num_placeholders
        if state.num_placeholders and (state.waits_for_own_token or num_tokens >= state.max_tokens):
            return 0
        return num_tokens - state.num_computed_tokens

    def _commit(self, state: RequestState, num_tokens: int) -> Scheduled:
        start = state.num_computed_tokens
        state.num_computed_tokens += num_tokens
        state.steps_in_flight += 1
        samples = state.num_computed_tokens == state.num_tokens and state.request.sampling.max_new_tokens > 0
        state.num_placeholders += samples
        return Scheduled(state, start, num_tokens, samples)

    def _grow(self, state: RequestState, num_tokens: int) -> bool:
        """Blocks for a running request's next tokens, preempting younger requests; False if it gave way itself."""
        if state.num_computed_tokens + num_tokens <= len(state.block_table) * self.blocks.block_size:
            return True
        needed = self.blocks.blocks_for(state.num_computed_tokens + num_tokens) - len(state.block_table)
        while True:
            new = self.blocks.allocate(max(needed, 0))
            if new is not None:
                state.block_table.extend(new)
                return True
            victim = self.running[-1]
            self._preempt(victim)
            if victim is state:
                return False

    def _admit(self, state: RequestState) -> bool:
        """Blocks for all known tokens of a waiting request, cached prefix first, leaving one per running request."""
        prefix = self._cached_prefix(state)
        needed = self.blocks.blocks_for(state.num_tokens) - len(prefix)
        spare = len(self.running)
        if self.blocks.num_free_without(prefix) < needed + spare:
            return False
        self.blocks.share(prefix)
        state.block_table = prefix + (self.blocks.allocate(needed) or [])
        state.num_computed_tokens = len(prefix) * self.blocks.block_size
        state.num_named_blocks = len(prefix)
        if state.num_cached_tokens is None:
            state.num_cached_tokens = state.num_computed_tokens
            state.started_s = time.monotonic()
        return True

    def _cached_prefix(self, state: RequestState) -> list[int]:
        """Reusable blocks; the last known token is always computed, since its logits are wanted."""
        if not self.enable_prefix_caching or state.wants_every_position:
            return []
        limit = (state.num_tokens - 1) // self.blocks.block_size
        return self.blocks.find_prefix(state.full_hashes(self.blocks.block_size)[:limit])

    def _name_full_blocks(self, state: RequestState, num_tokens: int) -> None:
        """Make blocks whose num_tokens tokens are really in the cache findable."""
        if not state.block_table:
            return
        hashes = state.full_hashes(self.blocks.block_size)
        count = min(num_tokens // self.blocks.block_size, len(hashes))
        for index in range(state.num_named_blocks, count):
            self.blocks.name(state.block_table[index], hashes[index])
        state.num_named_blocks = max(state.num_named_blocks, count)

    def _preempt(self, state: RequestState) -> None:
        """Take all blocks of a running request; it will be computed anew. Steps in flight still write to its old blocks
        before any later step does, so they can be handed on at once."""
        self.num_preemptions += 1
        self.running.remove(state)
        self.blocks.release(state.block_table)
        state.block_table = []
        state.num_computed_tokens = 0
        state.num_named_blocks = 0
        self.waiting.appendleft(state)

    def _release_retired(self) -> None:
        for state in [state for state in self._retiring if not state.steps_in_flight]:
            self._retiring.remove(state)
            self.blocks.release(state.block_table)
            state.block_table = []
