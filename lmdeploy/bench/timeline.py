"""Runs random prompts through an engine client and notes when each token came. It judges nothing.

Prompts are token ids, and end tokens are ignored, so that the work is the same for every model and every run.
"""

from __future__ import annotations

import queue
import random
import time
import uuid
from dataclasses import dataclass, field

from lmdeploy.engine.client import EngineClient
from lmdeploy.engine.request import Request, RequestOutput, SamplingParams
from lmdeploy.errors import ConfigError, EngineDead


@dataclass
class Timeline:
    """When the tokens of one request came, in seconds of one clock: (time, number of tokens) of each delivery."""

    prompt_tokens: int
    submitted: float = 0.0
    deliveries: list[tuple[float, int]] = field(default_factory=list)

    @property
    def first(self) -> float:
        return self.deliveries[0][0]

    @property
    def last(self) -> float:
        return self.deliveries[-1][0]

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.first - self.submitted

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.deliveries)

    def tokens_between(self, start: float, end: float) -> int:
        """Tokens that came after `start` and not after `end`."""
        return sum(count for when, count in self.deliveries if start < when <= end)


def random_prompt(num_tokens: int, vocab_size: int, generator: random.Random) -> list[int]:
    """Token ids drawn alike from the whole vocabulary."""
    return [generator.randrange(vocab_size) for _ in range(num_tokens)]


def run_requests(client: EngineClient, prompts: list[list[int]], output_tokens: int) -> list[Timeline]:
    """Submit all prompts at once, greedy, and wait for exactly `output_tokens` tokens of each.

    Raises ConfigError if a request does not fit the engine, and what the engine reports.
    """
    check_fits(client, max(map(len, prompts)), output_tokens)
    inbox: queue.SimpleQueue[tuple[float, RequestOutput]] = queue.SimpleQueue()
    timelines = {uuid.uuid4().hex: Timeline(len(prompt)) for prompt in prompts}
    sampling = SamplingParams(max_new_tokens=output_tokens)
    for (name, timeline), prompt in zip(timelines.items(), prompts, strict=True):
        timeline.submitted = time.perf_counter()
        client.submit(Request(name, prompt, sampling), lambda output: inbox.put((time.perf_counter(), output)))
    num_running = len(timelines)
    while num_running:
        when, output = inbox.get()
        if output.error is not None:
            raise output.error
        if output.token_ids:
            timelines[output.request_id].deliveries.append((when, len(output.token_ids)))
        num_running -= output.is_finished
    short = [t for t in timelines.values() if t.num_tokens != output_tokens]
    if short:
        raise EngineDead(f"{len(short)} requests ended before their {output_tokens} tokens")
    return list(timelines.values())


def check_fits(client: EngineClient, prompt_tokens: int, output_tokens: int) -> None:
    """Raise ConfigError where prompt and answer are longer than a session."""
    if prompt_tokens + output_tokens > client.info.session_len:
        raise ConfigError(
            f"{prompt_tokens} prompt and {output_tokens} output tokens do not fit session_len "
            f"{client.info.session_len}: ask for fewer, or raise session_len"
        )
