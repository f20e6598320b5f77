"""Repeated steps against the same steps planned one by one: equal plans, outputs and blocks, whatever happens between."""

from __future__ import annotations

import random
from collections import deque

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.engine.block_manager import BlockManager, root_hash
from lmdeploy.engine.repeat import RepeatedPlan, RepeatingScheduler
from lmdeploy.engine.request import Request, RequestOutput, SamplingParams
from lmdeploy.engine.scheduler import Scheduler, StepPlan
from lmdeploy.engine.state import INVALID_TOKEN, RequestState

BATCH, VOCAB = 4, 40


class World:
    """A scheduler and a device that samples a token which only a request's history decides."""

    def __init__(self, kind: type[Scheduler], num_blocks: int, caching: bool) -> None:
        self.scheduler = kind(
            BlockManager(num_blocks, 4),
            max_batch_size=BATCH,
            max_tokens_per_step=9,
            session_len=24,
            enable_prefix_caching=caching,
        )
        self.states: dict[str, RequestState] = {}
        self.tokens: dict[str, list[int]] = {}
        self.pending: deque[tuple[StepPlan, list[int | None]]] = deque()
        self.num_repeated = 0

    def add(self, request: Request) -> None:
        state = self.states[request.request_id] = RequestState(request, 0, root_hash())
        self.tokens[request.request_id] = list(request.prompt_ids)
        self.scheduler.add(state)

    def abort(self, name: str) -> None:
        if not self.states[name].is_finished:
            self.scheduler.finish(self.states[name])

    def schedule(self) -> object:
        """Everything that can be seen of the next plan; its tokens are sampled."""
        plan = self.scheduler.schedule()
        if plan is None:
            return None
        self.num_repeated += isinstance(plan, RepeatedPlan)
        names = [state.request_id for state in plan.states]
        self.pending.append((plan, [self._sample(n) if s else None for n, s in zip(names, plan.samples, strict=True)]))
        tables = [list(state.block_table) for state in plan.states]
        lengths = [] if plan.states.is_greedy else [state.num_tokens for state in plan.states]
        numbers = plan.starts.tolist(), plan.num_tokens.tolist(), list(plan.samples)
        return plan.number, names, *numbers, plan.is_decode, tables, lengths

    def _sample(self, name: str) -> int:
        tokens = self.tokens[name]
        token = hash((*name.encode(), len(tokens), *tokens[-3:])) % VOCAB
        tokens.append(token if token else INVALID_TOKEN)
        return tokens[-1]

    def update(self) -> list[RequestOutput]:
        return self.scheduler.update(*self.pending.popleft())

    def counters(self) -> tuple[int, ...]:
        scheduler = self.scheduler
        return scheduler.blocks.num_free, scheduler.num_preemptions, len(scheduler.running), len(scheduler.waiting)


def random_request(rng: random.Random, name: str) -> Request:
    sampling = SamplingParams(
        max_new_tokens=rng.choice([0, 1, 4, 12, 40]),
        min_new_tokens=rng.choice([0, 0, 3]),
        temperature=rng.choice([0.0, 0.0, 1.0]),
        stop_token_ids=rng.choice([(), (3, 4)]),
        bad_token_sequences=rng.choice([()] * 5 + [((1, 2),)]),
        repetition_ngram_size=(size := rng.choice([0, 0, 0, 1])),
        repetition_ngram_threshold=2 * size,
    )
    return Request(name, [1] * rng.choice([1, 2, 5, 12]), sampling)


@settings(max_examples=600, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    num_blocks=st.integers(6, 24),
    in_flight=st.integers(1, 3),
    caching=st.booleans(),
    rate=st.sampled_from((0.05, 0.4)),
)
def test_repeats_are_what_the_base_would_have_planned(
    seed: int, num_blocks: int, in_flight: int, caching: bool, rate: float
) -> None:
    rng = random.Random(seed)
    worlds = [World(kind, num_blocks, caching) for kind in (Scheduler, RepeatingScheduler)]

    def both(what: str, *arguments: object) -> object:
        base, repeating = (getattr(world, what)(*arguments) for world in worlds)
        assert repeating == base
        return base

    def maybe_abort() -> None:
        if count and rng.random() < 0.05:
            both("abort", str(rng.randint(1, count)))

    count = 0
    for step in range(400):
        if step < 60 and rng.random() < rate:
            both("add", random_request(rng, str(count := count + 1)))
        maybe_abort()
        plan = both("schedule") if len(worlds[0].pending) < in_flight else None
        maybe_abort()
        if worlds[0].pending and (plan is None or len(worlds[0].pending) == in_flight):
            base, repeating = (msgspec.msgpack.encode(world.update()) for world in worlds)
            assert repeating == base
        both("counters")
    for world in worlds:
        assert not world.scheduler.has_work
        assert world.scheduler.blocks.num_free == num_blocks
    assert not worlds[0].num_repeated
    base, repeating = ([state.token_ids for state in world.states.values()] for world in worlds)
    assert repeating == base


def test_most_steps_of_a_busy_engine_are_repeats() -> None:
    world = World(RepeatingScheduler, 24, caching=False)
    for name in "abcd":
        world.add(Request(name, [1, 1], SamplingParams(max_new_tokens=20)))
    steps = 0
    while world.scheduler.has_work:
        steps += world.schedule() is not None
        world.update()
    assert world.num_repeated > 0.6 * steps
