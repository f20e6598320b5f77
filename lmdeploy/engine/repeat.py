"""Decode steps that do what the one before did, one token further: planned and ended without a look at each request.

Most steps of a busy engine are of this kind; with many requests the looks would take the host longer than all else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lmdeploy.engine.request import RequestOutput
from lmdeploy.engine.scheduler import Cohort, Scheduler, StepPlan


class Bounds:
    """How long the steps of a cohort [B] can repeat.

    ends: [B], where a request takes no more tokens; 0 for one that waits for its own. room: [B] tokens that its blocks hold.
    num_free: how many repeats from now on need no look at these.
    """

    def __init__(self, states: Cohort, block_size: int) -> None:
        self.ends = np.array([0 if state.waits_for_own_token else state.max_tokens - 1 for state in states])
        self.room = np.array([len(state.block_table) for state in states]) * block_size
        self.num_free = 0
        self._end_ids: frozenset[int] = frozenset().union(*(state.end_ids for state in states))
        self._has_other_ends = any(state.has_other_ends for state in states)

    def let_all_go_on(self, starts: np.ndarray, tokens: Sequence[int | None]) -> bool:
        """Whether no token [B] of a step at starts [B] ends an answer."""
        if self._has_other_ends or not self._end_ids.isdisjoint(tokens):
            return False
        return self.num_free > 0 or not (starts + 1 >= self.ends).any()


@dataclass(eq=False)
class RepeatedPlan(StepPlan):
    """A step of the cohort of the step before it. Its requests are told how far they are when the repeats end."""

    bounds: Bounds = field(kw_only=True)

    def settle(self) -> None:
        for state, start in zip(self.states, self.starts.tolist(), strict=True):
            state.num_computed_tokens = start + 1


class RepeatingScheduler(Scheduler):
    """Plans what its base plans."""

    def schedule(self) -> StepPlan | None:
        plan = self._repeat()
        if plan is None:
            if isinstance(self._last_plan, RepeatedPlan):
                self._last_plan.settle()
            return super().schedule()
        if not plan.states.is_greedy:  # the sampler asks each request how far it is
            plan.settle()
        self._last_plan = plan
        self._num_scheduled_steps = plan.number
        return plan

    def update(self, plan: StepPlan, tokens: Sequence[int | None]) -> list[RequestOutput]:
        is_repeated = isinstance(plan, RepeatedPlan) and not self.enable_prefix_caching
        if not is_repeated or not plan.bounds.let_all_go_on(plan.starts, tokens):  # type: ignore[attr-defined]
            return super().update(plan, tokens)
        self._num_ended_steps += 1
        outputs = []
        for state, token in zip(plan.states, tokens, strict=True):
            if token is not None and not state.is_finished:
                state.token_ids.append(token)
                outputs.append(
                    RequestOutput(state.request_id, [token], None, len(state.prompt_ids), state.num_cached_tokens or 0)
                )
        self._release_retired()
        return outputs

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
