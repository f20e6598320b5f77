"""Which request computes how many tokens in the next step, and what a finished step means for each.

There is no prefill phase and no decode phase: a request is scheduled `num_tokens - num_computed_tokens` tokens under
one token budget. Chunked prefill, prefix hits and decode are that one subtraction. It holds no tensor.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lmdeploy.engine.block_manager import BlockManager
from lmdeploy.engine.finish import finish_reason
from lmdeploy.engine.request import RequestOutput
from lmdeploy.engine.state import RequestState
from lmdeploy.messages import FinishReason

Part = tuple[RequestState, int, int, bool]  # of a step: whose, from where, how many tokens, whether it samples


class Cohort(list[RequestState]):
    """Requests that go through a step together, maybe through many. Never changed: what is true of all is asked once."""

    @cached_property
    def is_greedy(self) -> bool:
        """Whether every token is the largest of the model's own logits."""
        return all(state.request.sampling.is_plain_greedy for state in self)

    @cached_property
    def wants_report(self) -> bool:
        return any(state.request.sampling.wants_report for state in self)

    @cached_property
    def wants_hidden_states(self) -> bool:
        return any(state.request.sampling.wants_hidden_states for state in self)


@dataclass(eq=False)
class StepPlan:
    """One step of the device: of each request some tokens, from a position on; the last of them may sample.

    number: counts the steps. starts, num_tokens: [B] int64, samples: [B]; in the order of the states. is_decode: everyone has
    one token, which samples. grown: of a step that is the one before it, one token further, the rows whose requests have got
    a block since; None for any other.
    """

    number: int
    states: Cohort
    starts: np.ndarray
    num_tokens: np.ndarray
    samples: Sequence[bool]
    is_decode: bool
    grown: list[int] | None = None

    @classmethod
    def of(cls, number: int, parts: Sequence[Part]) -> StepPlan:
        """A plan of one part per request."""
        states, starts, num_tokens, samples = zip(*parts, strict=True)
        is_decode = max(num_tokens) == 1 and all(samples)
        return cls(number, Cohort(states), np.array(starts), np.array(num_tokens), samples, is_decode)


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
        self._retiring: deque[RequestState] = deque()
        self._last_plan: StepPlan | None = None
        self._num_scheduled_steps = 0
        self._num_ended_steps = 0

    def add(self, state: RequestState) -> None:
        state.max_tokens = min(len(state.prompt_ids) + state.request.sampling.max_new_tokens, self.session_len)
        self.waiting.append(state)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._retiring)

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can be computed now."""
        self._last_plan = self._plan()
        self._num_scheduled_steps += self._last_plan is not None
        return self._last_plan

    def update(self, plan: StepPlan, tokens: Sequence[int | None]) -> list[RequestOutput]:
        """Take a finished step's tokens, one per request of the plan (None where it does not sample).

        Returns an output for each request that lives, with its new token and why it ended, if it did. Tokens of requests
        that ended while the step ran are dropped.
        """
        self._num_ended_steps += 1
        outputs = []
        for state, token, end in zip(plan.states, tokens, (plan.starts + plan.num_tokens).tolist(), strict=True):
            if state.is_finished:
                continue
            reason: FinishReason | None = None
            if token is not None:
                state.token_ids.append(token)
                if token in state.end_ids or state.has_other_ends or len(state.token_ids) >= state.max_tokens:
                    reason = finish_reason(state)
            elif end == state.max_tokens:  # nothing but the prompt is asked for
                reason = "length"
            if self.enable_prefix_caching and end >= (state.num_named_blocks + 1) * self.blocks.block_size:
                self._name_full_blocks(state, end)
            if reason is not None:
                self.finish(state)
            outputs.append(state.output([] if token is None else [token], reason))
        self._release_retired()
        return outputs

    def finish(self, state: RequestState) -> None:
        """Take a request out; its blocks return when the last step that touches them has ended."""
        state.is_finished = True
        if state in self.running:
            self.running.remove(state)
        elif state in self.waiting:
            self.waiting.remove(state)
        state.last_step = self._num_scheduled_steps
        self._retiring.append(state)
        self._release_retired()

    def abort_all(self) -> list[RequestOutput]:
        """End every request; one output for each."""
        states = [*self.running, *self.waiting]
        for state in states:
            self.finish(state)
        return [state.output([], "abort") for state in states]

    def _plan(self) -> StepPlan | None:
        parts: list[Part] = []
        budget = self.max_tokens_per_step
        # Decodes first: a long prompt must not hold them up. Only a decode can need new blocks (a prompt got all of its
        # own at admission), so a preempted request is never one that this step has already scheduled. Without blocks a
        # request has been preempted since the loop began.
        wanted = [(state, self._num_schedulable(state)) for state in self.running]
        for state, num_tokens in sorted(wanted, key=lambda pair: pair[1] > 1):
            num_tokens = min(num_tokens, budget)
            if num_tokens and state.block_table and self._grow(state, num_tokens):
                parts.append(self._commit(state, num_tokens))
                budget -= num_tokens
        while budget and (admitted := self._admit_next()) is not None:
            num_tokens = min(self._num_schedulable(admitted), budget)
            parts.append(self._commit(admitted, num_tokens))
            budget -= num_tokens
        return StepPlan.of(self._num_scheduled_steps + 1, parts) if parts else None

    def _num_schedulable(self, state: RequestState) -> int:
        """The one subtraction; behind tokens in flight one more, if it may be sampled."""
        known, computed = len(state.token_ids), state.num_computed_tokens
        if computed < known:
            return known - computed
        return 0 if state.waits_for_own_token or computed + 1 >= state.max_tokens else 1

    def _commit(self, state: RequestState, num_tokens: int) -> Part:
        start = state.num_computed_tokens
        state.num_computed_tokens += num_tokens
        is_complete = state.num_computed_tokens >= len(state.token_ids)
        return state, start, num_tokens, is_complete and state.request.sampling.max_new_tokens > 0

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

    def _admit_next(self) -> RequestState | None:
        """The oldest waiting request, running from now on; None if there is none or no room for it."""
        if not self.waiting or len(self.running) >= self.max_batch_size:
            return None
        state = self.waiting[0]
        if state.last_step > self._num_ended_steps or not self._admit(state):
            return None
        self.running.append(self.waiting.popleft())
        return state

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
        state.last_step = self._num_scheduled_steps
        self.waiting.appendleft(state)

    def _release_retired(self) -> None:
        """Take the blocks of requests that no step in flight touches any more."""
        while self._retiring and self._retiring[0].last_step <= self._num_ended_steps:
            state = self._retiring.popleft()
            self.blocks.release(state.block_table)
            state.block_table = []
