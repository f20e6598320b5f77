"""The scheduler against a cache that remembers exactly what was written where.

The fake device writes, for every computed token, the hash of all tokens up to it into its slot, checks that everything
before it is in place, and samples a token from that hash. So a wrong block, a lost token, a stale prefix or a reuse too
early changes an answer or trips a check, whatever the order of steps.
"""

from __future__ import annotations

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.engine.apart import ApartScheduler
from lmdeploy.engine.block_manager import BlockManager, root_hash
from lmdeploy.engine.repeat import RepeatingScheduler
from lmdeploy.engine.request import Request, SamplingParams
from lmdeploy.engine.scheduler import Part, Scheduler, StepPlan
from lmdeploy.engine.state import RequestState

VOCAB = 7
STOP = 0


def next_token(tokens: list[int]) -> int:
    return hash((len(tokens), *tokens[-3:])) % VOCAB


def expected_answer(prompt: list[int], max_new: int, session_len: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_new and len(tokens) < session_len:
        tokens.append(next_token(tokens))
        if tokens[-1] == STOP:
            break
    return tokens[len(prompt) :]


def parts(plan: StepPlan) -> list[Part]:
    return list(zip(plan.states, plan.starts.tolist(), plan.num_tokens.tolist(), plan.samples, strict=True))


class FakeDevice:
    """Executes plans in order, knowing sampled tokens that the host has not seen yet."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.true_tokens: dict[str, list[int]] = {}

    def execute(self, plan: StepPlan) -> list[int | None]:
        results: list[int | None] = []
        for state, start, num_tokens, samples in parts(plan):
            tokens = self.true_tokens.setdefault(state.request_id, list(state.prompt_ids))
            end = start + num_tokens
            for position in range(start, end):
                self.slots[self.slot(state, position)] = tuple(tokens[: position + 1])
            for position in range(end):
                assert self.slots[self.slot(state, position)] == tuple(tokens[: position + 1])
            if samples:
                assert end == len(tokens)
                tokens.append(next_token(tokens))
                results.append(tokens[-1])
            else:
                results.append(None)
        return results

    def slot(self, state: RequestState, position: int) -> tuple[int, int]:
        return state.block_table[position // self.block_size], position % self.block_size


prompts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=8)


@settings(max_examples=1500, deadline=None)
@given(
    prompts=prompts,
    max_new=st.integers(1, 9),
    num_blocks=st.integers(6, 16),
    tokens_per_step=st.integers(4, 24),
    steps_in_flight=st.integers(1, 3),
    caching=st.booleans(),
    abort_at=st.integers(0, 12),
    scheduler_class=st.sampled_from((Scheduler, RepeatingScheduler, ApartScheduler)),
)
def test_any_schedule_gives_the_answers_of_one_by_one(
    prompts: list[list[int]],
    max_new: int,
    num_blocks: int,
    tokens_per_step: int,
    steps_in_flight: int,
    caching: bool,
    abort_at: int,
    scheduler_class: type[Scheduler],
) -> None:
    blocks = BlockManager(num_blocks, block_size=4)
    scheduler = scheduler_class(
        blocks, max_batch_size=4, max_tokens_per_step=tokens_per_step, session_len=24, enable_prefix_caching=caching
    )
    device = FakeDevice(4)
    states = [
        RequestState(
            Request(str(index), prompt, SamplingParams(max_new_tokens=max_new, stop_token_ids=(STOP,))),
            seed=0,
            root=root_hash(),
        )
        for index, prompt in enumerate(prompts)
    ]
    for state in states:
        scheduler.add(state)
    answers: dict[str, list[int]] = {state.request_id: [] for state in states}
    in_flight: deque[tuple[StepPlan, list[int | None]]] = deque()
    aborted = set()
    for step in range(2000):
        if step == abort_at and not states[-1].is_finished:
            scheduler.finish(states[-1])
            aborted.add(states[-1].request_id)
        plan = scheduler.schedule() if len(in_flight) < steps_in_flight else None
        if plan is not None:
            assert plan.num_tokens.sum() <= tokens_per_step
            assert plan.is_decode == all(part[2:] == (1, True) for part in parts(plan))
            in_flight.append((plan, device.execute(plan)))
        if in_flight and (plan is None or len(in_flight) == steps_in_flight):
            done, tokens = in_flight.popleft()
            for output in scheduler.update(done, tokens):
                answers[output.request_id].extend(output.token_ids)
        if not scheduler.has_work and not in_flight:
            break
    assert not scheduler.has_work
    assert blocks.num_free == num_blocks
    for state in states:
        expected = expected_answer(state.prompt_ids, max_new, 24)
        given_answer = answers[state.request_id]
        if state.request_id in aborted:
            assert given_answer == expected[: len(given_answer)]
        else:
            assert given_answer == expected


def make_scheduler(**overrides: object) -> Scheduler:
    defaults: dict[str, object] = {"max_batch_size": 4, "max_tokens_per_step": 8, "session_len": 64}
    defaults["enable_prefix_caching"] = False
    return Scheduler(BlockManager(32, 4), **{**defaults, **overrides})  # type: ignore[arg-type]


def make_state(name: str, prompt_len: int, **sampling: object) -> RequestState:
    return RequestState(
        Request(name, [1] * prompt_len, SamplingParams(**sampling)),  # type: ignore[arg-type]
        seed=0,
        root=root_hash(),
    )


def test_a_long_prompt_does_not_hold_up_decodes() -> None:
    scheduler = make_scheduler()
    long, short = make_state("long", 40), make_state("short", 2)
    scheduler.add(short)
    first = scheduler.schedule()
    assert first is not None
    scheduler.update(first, [1])
    scheduler.add(long)
    for _ in range(4):
        plan = scheduler.schedule()
        assert plan is not None
        assert [(state.request_id, count) for state, _, count, _ in parts(plan)] == [("short", 1), ("long", 7)]
        scheduler.update(plan, [1, None])


def test_a_shared_prefix_is_computed_once() -> None:
    scheduler = make_scheduler(enable_prefix_caching=True, max_tokens_per_step=64)
    first, second = make_state("first", 13), make_state("second", 13)
    scheduler.add(first)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, [1])
    scheduler.add(second)
    plan = scheduler.schedule()
    assert plan is not None
    assert [part[1:3] for part in parts(plan)] == [(13, 1), (12, 1)]
    assert second.num_cached_tokens == 12
    assert second.block_table[:3] == first.block_table[:3]
