"""What decode steps on a GPU read of requests, against what the scheduler meant, over random schedules.

Every step of one token each goes the way of rows and tables; every other samples as an eager step does. The device here
samples a token that only its history decides, so that a wrong line, block or token shows.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.engine.block_manager import BlockManager, root_hash
from lmdeploy.engine.repeat import RepeatingScheduler
from lmdeploy.engine.request import Request, SamplingParams
from lmdeploy.engine.scheduler import StepPlan
from lmdeploy.engine.slots import ROW_INTS, Slots
from lmdeploy.engine.state import RequestState
from lmdeploy.kernels.reference.decode_inputs import DecodeInputs, prepare_decode, store_tokens

BLOCK, BATCH, SESSION = 2, 4, 24


class Device:
    """Runs plans in order: checks what a decode step would read, and samples."""

    def __init__(self, eager_every: int) -> None:
        """eager_every: so many decode steps, one goes the other way, as if it had no graph."""
        self.eager_every = eager_every
        self.slots = Slots(BATCH, SESSION // BLOCK + 1, torch.device("cpu"))
        self.tokens: dict[str, list[int]] = {}
        self.kinds: Counter[str] = Counter()

    def run(self, plan: StepPlan) -> list[int | None]:
        is_replayed = plan.is_decode and plan.number % self.eager_every != 0
        rows = self._check(plan) if is_replayed else None
        sampling = [state for state, samples in zip(plan.states, plan.samples, strict=True) if samples]
        tokens = {state.request_id: self._sample(state) for state in sampling}
        known = torch.tensor(list(tokens.values()), dtype=torch.int64)
        if rows is not None:
            store_tokens(rows, known, self.slots.last_tokens)
        elif sampling:
            self.slots.keep(known, sampling)
        return [tokens.get(state.request_id) for state in plan.states]

    def _sample(self, state: RequestState) -> int:
        tokens = self.tokens.setdefault(state.request_id, list(state.prompt_ids))
        tokens.append(2 + (sum(tokens) + 7 * len(tokens)) % 50)
        return tokens[-1]

    def _check(self, plan: StepPlan) -> torch.Tensor:
        self.kinds["first" if plan.grown is None else "grown" if plan.grown else "repeated"] += 1
        size = len(plan.states)
        padded = np.full((BATCH, ROW_INTS), 99, np.int32)
        self.slots.write_rows(plan, padded)
        assert (padded[size:] == (self.slots.padding, 0, -1, 0, 1)).all()
        rows, inputs = (
            torch.from_numpy(padded[:size]),
            DecodeInputs.empty(size, SESSION // BLOCK + 1, torch.device("cpu")),
        )
        prepare_decode(rows, self.slots.last_tokens, self.slots.tables, BLOCK, inputs)
        assert inputs.positions.tolist() == plan.starts.tolist()
        assert inputs.prompt_lens.tolist() == [len(state.prompt_ids) for state in plan.states]
        for row, (state, start) in enumerate(zip(plan.states, plan.starts.tolist(), strict=True)):
            count = start // BLOCK + 1
            assert inputs.block_tables[row, :count].tolist() == state.block_table[:count]
            assert inputs.input_ids[row] == self.tokens.get(state.request_id, state.prompt_ids)[start]
        return rows


def run_all(
    prompts: list[list[int]],
    max_new: int,
    num_blocks: int,
    in_flight: int,
    caching: bool,
    eager_every: int,
    abort_every: int = 1000,
    **sampling: Any,
) -> tuple[list[RequestState], Device]:
    """Run requests for the prompts, some of which join late, to their end, or abort the oldest every so many steps."""
    blocks = BlockManager(num_blocks, BLOCK)
    scheduler = RepeatingScheduler(
        blocks, max_batch_size=BATCH, max_tokens_per_step=8, session_len=SESSION, enable_prefix_caching=caching
    )
    device, pending = Device(eager_every), deque[tuple[StepPlan, list[int | None]]]()
    states = [
        RequestState(Request(str(i), prompt, SamplingParams(max_new_tokens=max_new + i, **sampling)), 0, root_hash())
        for i, prompt in enumerate(prompts)
    ]
    late = states[2:]
    for state in states[:2]:
        scheduler.add(state)
    for step in range(600):
        if late and step % 5 == 4:
            scheduler.add(late.pop())
        if step % abort_every == abort_every - 1 and scheduler.running:
            aborted = scheduler.running[0]
            scheduler.finish(aborted)
            device.slots.forget(aborted.request_id)
        plan = scheduler.schedule() if len(pending) < in_flight else None
        if plan is not None:
            pending.append((plan, device.run(plan)))
        if pending and (plan is None or len(pending) == in_flight):
            for output in scheduler.update(*pending.popleft()):
                if output.is_finished:
                    device.slots.forget(output.request_id)
    assert not scheduler.has_work
    assert blocks.num_free == num_blocks
    return states, device


@settings(max_examples=300, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=7),
    max_new=st.integers(1, 14),
    num_blocks=st.integers(12, 40),
    in_flight=st.integers(1, 3),
    caching=st.booleans(),
    eager_every=st.integers(2, 9),
    abort_every=st.sampled_from((3, 11, 1000)),
    stop_token_ids=st.sampled_from(((), (5, 11, 17, 23, 31, 47))),
)
def test_the_device_reads_what_the_scheduler_meant(
    prompts: list[list[int]],
    max_new: int,
    num_blocks: int,
    in_flight: int,
    caching: bool,
    eager_every: int,
    abort_every: int,
    stop_token_ids: tuple[int, ...],
) -> None:
    states, device = run_all(
        prompts, max_new, num_blocks, in_flight, caching, eager_every, abort_every, stop_token_ids=stop_token_ids
    )
    for state in states:
        assert state.token_ids == device.tokens.get(state.request_id, state.prompt_ids)[: len(state.token_ids)]
        if abort_every == 1000 and not stop_token_ids:
            assert len(state.token_ids) == state.max_tokens


def test_most_decode_steps_repeat_the_one_before() -> None:
    _, device = run_all([[1, 0], [1], [0], [1, 1]], 14, 64, 2, caching=False, eager_every=100)
    assert device.kinds["grown"] + device.kinds["repeated"] > 2 * device.kinds["first"]
    assert min(device.kinds.values()) > 0


def test_a_request_joins_those_that_repeat() -> None:
    scheduler = RepeatingScheduler(
        BlockManager(32, BLOCK),
        max_batch_size=2,
        max_tokens_per_step=8,
        session_len=SESSION,
        enable_prefix_caching=False,
    )
    first, second, third = (
        RequestState(Request(name, [1], SamplingParams(max_new_tokens=9)), 0, root_hash()) for name in "abc"
    )
    scheduler.add(first)
    for _ in range(3):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.update(plan, [5])
    assert plan.grown is not None
    for late, expected in ((second, [first, second]), (third, [first, second])):  # there is no place for the third
        scheduler.add(late)
        plan = scheduler.schedule()
        assert plan is not None
        assert plan.states == expected
        scheduler.update(plan, [5, 5])
    assert plan.grown is not None
