"""Ten thousand random requests, good and bad, with aborts: every one answered or refused, and nothing is left behind."""

from __future__ import annotations

import random
from pathlib import Path

from lmdeploy.engine.request import Request, SamplingParams
from lmdeploy.errors import RequestError
from tests.engine.driver import make_engine
from tests.tiny_model import make_tiny_llama

COUNT = 10_000
NUM_BLOCKS = 40


def random_request(rng: random.Random, name: str) -> Request:
    prompt_ids = [rng.randrange(4) for _ in range(rng.choice([1, 3, 8, 20, 45]))]
    sampling = SamplingParams(
        max_new_tokens=rng.choice([0, 1, 2, 5]),
        temperature=rng.choice([0.0, 0.9]),
        top_k=rng.choice([0, 4]),
        top_p=rng.choice([1.0, 0.7]),
        seed=rng.choice([None, 3]),
        stop_token_ids=rng.choice([(), (1, 2, 3)]),
        presence_penalty=rng.choice([0.0, 0.0, 0.5]),
        prompt_logprobs=rng.random() < 0.05,
        logprobs=rng.choice([None, None, None, 2]),
    )
    if rng.random() < 0.1:
        prompt_ids = rng.choice([[], [10**6], [-3], [1] * 5000])
    if rng.random() < 0.05:
        sampling.temperature = rng.choice([float("nan"), float("inf"), -1.0])
    return Request(name, prompt_ids, sampling)


def test_ten_thousand_random_requests(tmp_path: Path) -> None:
    model = make_tiny_llama(
        tmp_path / "m", hidden_size=32, intermediate_size=32, num_hidden_layers=1, max_position_embeddings=128
    )
    engine = make_engine(
        model,
        block_size=8,
        cache_max_entry_count=NUM_BLOCKS,
        max_batch_size=64,
        max_prefill_token_num=512,
        enable_prefix_caching=True,
        max_steps_in_flight=2,
    )
    rng = random.Random(0)
    refused, live, ended = 0, set(), {}
    submitted = 0
    while submitted < COUNT or engine.has_work:
        for _ in range(min(rng.randrange(80), COUNT - submitted)):
            request = random_request(rng, str(submitted))
            submitted += 1
            try:
                engine.add(request)
                live.add(request.request_id)
            except RequestError:
                refused += 1
        if live and rng.random() < 0.3:
            output = engine.abort(rng.choice(sorted(live)))
            assert output is not None
            live.remove(output.request_id)
            ended[output.request_id] = output.finish_reason
        for output in engine.step():
            if output.is_finished:
                live.remove(output.request_id)
                ended[output.request_id] = output.finish_reason
    assert not live
    assert refused + len(ended) == COUNT
    assert refused > COUNT // 20
    assert set(ended.values()) == {"stop", "length", "abort"}
    assert engine.stats()["num_free_blocks"] == NUM_BLOCKS
    assert engine.stats()["num_running"] == engine.stats()["num_waiting"] == 0
