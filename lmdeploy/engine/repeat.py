"""Decode steps that do what the one before did, one token further: planned and ended without a look at each request.

Most steps of a busy engine are of this kind; with many requests the looks would take the host longer than all else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TypeGuard

import numpy as np

from lmdeploy.engine.request import RequestOutput
from lmdeploy.engine.scheduler import Cohort, Scheduler, StepPlan


class Bounds:
    """How long the steps of a cohort [B] can repeat.

    ends: [B], where a request takes no more tokens; 0 for one that waits for its own. room: [B] tokens that its blocks hold.
    num_free: how many repeats from now on need no look at these. is_over: there are no more repeats. names, counts: what
    every output of a request says. untold: the tokens [B] of ended steps that the requests have still to be told.
    """

    def __init__(self, states: Cohort, block_size: int) -> None:
        self.ends = np.array([0 if state.waits_for_own_token else state.max_tokens - 1 for state in states])
        self.room = np.array([len(state.block_table) for state in states]) * block_size
        self.num_free = 0
        self.is_over = False
        self.names = [state.request_id for state in states]
        self.counts = [len(state.prompt_ids) for state in states], [state.num_cached_tokens or 0 for state in states]
        self.untold: list[Sequence[int]] = []
        # None among them: what becomes of a request without a token is the base's to say.
        self._end_ids: frozenset[int | None] = frozenset((None,)).union(*(state.end_ids for state in states))
        self._has_other_ends = any(state.has_other_ends for state in states)

    def let_all_go_on(self, tokens: Sequence[int | None], starts: np.ndarray) -> TypeGuard[Sequence[int]]:
        """Whether each request has a token [B] of a step at starts [B], and none ends an answer."""
        if self._has_other_ends or not self._end_ids.isdisjoint(tokens):
            return False
        return self.num_free > 0 or not (starts + 1 >= self.ends).any()


@dataclass(eq=False)
class RepeatedPlan(StepPlan):
    """A step of the cohort of the step before it. Its requests are told how far they are when the repeats end.

    So are their tokens: each request lies elsewhere in memory, and going to them all takes as long as the rest of a repeat.
    """

    bounds: Bounds = field(kw_only=True)

    def settle(self) -> None:
        for state, start in zip(self.states, self.starts.tolist(), strict=True):
            state.num_computed_tokens = start + 1
        self.tell()

    def tell(self) -> None:
        """Tell the requests their tokens of the steps that have ended."""
        for state, tokens in zip(self.states, zip(*self.bounds.untold, strict=True), strict=False):  # there may be none
            state.token_ids += tokens
        self.bounds.untold.clear()


class RepeatingScheduler(Scheduler):
    """Plans what its base plans."""

    def schedule(self) -> StepPlan | None:
        plan = self._repeat()
        if plan is None:
            if isinstance(self._last_plan, RepeatedPlan):
                self._last_plan.settle()
                self._last_plan.bounds.is_over = True
            return super().schedule()
        if not plan.states.is_greedy:  # the sampler asks each request how far it is
            plan.settle()
        self._last_plan = plan
        self._num_scheduled_steps = plan.number
        return plan

    def update(self, plan: StepPlan, tokens: Sequence[int | None]) -> list[RequestOutput]:
        if not isinstance(plan, RepeatedPlan):
            return super().update(plan, tokens)
        bounds = plan.bounds
        goes_on = not bounds.is_over and plan.states == self.running
        if not goes_on or not bounds.let_all_go_on(tokens, plan.starts):
            plan.tell()
            return super().update(plan, tokens)
        self._num_ended_steps += 1
        bounds.untold.append(tokens)
        if self.enable_prefix_caching:
            self._name_filled_blocks(plan)
        self._release_retired()
        return list(map(RequestOutput, bounds.names, [[token] for token in tokens], repeat(None), *bounds.counts))

    def _name_filled_blocks(self, plan: RepeatedPlan) -> None:
        """Make the blocks findable that a step has filled."""
        filled = np.flatnonzero((plan.starts + 1) % self.blocks.block_size == 0).tolist()
        if filled:
            plan.tell()
        for row in filled:
            self._name_full_blocks(plan.states[row], int(plan.starts[row]) + 1)

    def _repeat(self) -> RepeatedPlan | None:
        """The last step once more, one token further; None if anything else is to be decided."""
        last = self._last_plan
        if last is None or not last.is_decode or last.states != self.running:
            return None
        if self.waiting and len(last.states) < self.max_batch_size:
            return None
        bounds = last.bounds if isinstance(last, RepeatedPlan) else Bounds(last.states, self.blocks.block_size)
        starts, grown = last.starts + 1, []
        bounds.num_free -= 1
        if bounds.num_free < 0:
            grown = np.flatnonzero(starts >= bounds.room).tolist()
            if (starts >= bounds.ends).any() or len(grown) > self.blocks.num_free:
                return None
            for row in grown:
                last.states[row].block_table += self.blocks.allocate(1) or []
                bounds.room[row] += self.blocks.block_size
            bounds.num_free = int((np.minimum(bounds.room, bounds.ends) - starts).min()) - 1
        number = last.number + 1
        return RepeatedPlan(number, last.states, starts, last.num_tokens, last.samples, True, grown, bounds=bounds)
