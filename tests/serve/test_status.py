"""Models, health, metrics, and pages that need no network."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from lmdeploy.engine.request import Request
from lmdeploy.messages import GenerationConfig
from lmdeploy.serve.service import Job
from tests.serve.driver import endless, error_of

# Names that clients of LMDeploy's /metrics look for, less those of speculative decoding.
METRICS = {
    "num_requests_succeeded", "num_requests_failed", "num_requests_running", "num_requests_waiting", "gpu_cache_usage_perc",
    "prefix_cache_hit_rate", "prompt_tokens", "generation_tokens", "cached_tokens", "request_success",
    "request_prompt_tokens", "request_generation_tokens", "request_cached_tokens", "time_to_first_token_seconds",
    "time_per_output_token_seconds", "e2e_request_latency_seconds", "num_api_requests_routed", "num_api_requests_waiting",
    "request_cache_hit_ratio", "iteration_tokens_total", "iter_token_latency", "request_queue_time_seconds",
    "request_inference_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds", "backend_config_info",
}  # fmt: skip


def values(served: Any) -> dict[str, float]:
    answer = served.get("/metrics")
    assert answer.status_code == 200
    families = text_string_to_metric_families(answer.text)
    return {sample.name: sample.value for family in families for sample in family.samples if "le" not in sample.labels}


def test_models(serve: Any) -> None:
    served = serve()
    (card,) = served.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["owned_by"], card["max_model_len"]) == ("tiny", "model", "lmdeploy", 256)
    assert served.get("/v1/models/tiny").json() == card
    assert served.get("/v1/models/a/b").status_code == 404


def test_health(serve: Any) -> None:
    served = serve(heartbeat_timeout_s=5.0)
    assert [served.get(path).status_code for path in ("/health", "/health/live", "/health/ready")] == [200, 200, 200]
    assert served.get("/health").json()["status"] == "healthy"
    served.client.stats = lambda: {"heartbeat_age_s": 5.5}
    assert [served.get(path).status_code for path in ("/health", "/health/live", "/health/ready")] == [503, 200, 503]
    assert "no step for" in served.get("/health").json()["message"]


def test_metrics_count_answers(serve: Any) -> None:
    served = serve()
    served.complete(max_tokens=3)
    served.complete(max_tokens=4, stream=True)
    served.complete(prompt="x " * 300)
    found = values(served)
    names = {family.name for family in text_string_to_metric_families(served.get("/metrics").text)}
    assert {f"lmdeploy:{name}" for name in METRICS} <= names
    assert 'model_name="tiny"' in served.get("/metrics").text
    assert found["lmdeploy:num_requests_succeeded"] == 2
    assert found["lmdeploy:num_requests_failed"] == 1
    assert found["lmdeploy:generation_tokens_total"] == 7
    assert found["lmdeploy:prompt_tokens_total"] == 2 * len(served.engine.tokenizer.encode("the river"))
    assert found["lmdeploy:time_to_first_token_seconds_count"] == 1
    assert found["lmdeploy:e2e_request_latency_seconds_count"] == 2
    assert serve(has_metrics=False).get("/metrics").status_code == 404


def test_metrics_survive_the_engine(serve: Any) -> None:
    served = serve()
    served.complete(max_tokens=3)
    served.client.stats = lambda: {"num_running": 2.0, "queue_time/0": 3.0, "queue_time/sum": 0.5}
    assert values(served)["lmdeploy:num_requests_running"] == 2
    del served.client.stats
    served.client.close()
    found = values(served)
    assert found["lmdeploy:num_requests_succeeded"] == 1
    assert found["lmdeploy:num_requests_running"] == 0
    assert found["lmdeploy:request_queue_time_seconds_count"] == 3
    assert found["lmdeploy:request_queue_time_seconds_sum"] == 0.5


def _unhurried(request: Request) -> Iterator[int]:
    for token in endless(request):
        time.sleep(0.01)
        yield token


def test_metrics_tell_what_the_engine_has_and_what_waits_for_it(serve: Any) -> None:
    served = serve(_unhurried)
    seen: list[dict[str, float]] = []

    async def ask() -> None:
        job = Job(
            ["the river", "the sea"], GenerationConfig(n=2, max_new_tokens=200), do_preprocess=False, is_streaming=True
        )
        async with aclosing(served.service.answer(job)) as responses:
            while len(served.client.requests) < 4:
                await anext(responses)
            seen.append(await asyncio.to_thread(values, served))
        seen.append(await asyncio.to_thread(values, served))

    asyncio.run(ask())
    names = ("lmdeploy:num_api_requests_routed", "lmdeploy:num_api_requests_waiting")
    assert [tuple(found[name] for name in names) for found in seen] == [(4, 0), (0, 0)]


def test_what_the_engine_refuses_is_neither_waiting_nor_routed(serve: Any) -> None:
    served = serve()
    served.complete(prompt="x " * 300)
    served.complete(max_tokens=2)
    assert (served.service.num_routed, served.service.num_active) == (0, 0)


def test_metrics_tell_the_engines_settings(serve: Any) -> None:
    text = serve().get("/metrics").text
    (line,) = (line for line in text.splitlines() if line.startswith("lmdeploy:backend_config_info{"))
    assert all(
        part in line for part in ('session_len="256"', 'dtype="float32"', 'block_size="64"', 'model_name="tiny"')
    )


def test_pages_load_nothing_from_elsewhere(serve: Any) -> None:
    served = serve()
    for path in ("/", "/redoc"):
        page = served.get(path)
        assert page.status_code == 200
        sources = re.findall(r"""(?:src|href)=["']([^"']+)""", page.text)
        local = [source for source in sources if not source.startswith("data:")]
        assert len(local) >= 1
        for source in local:
            assert source.startswith("/"), source
            asset = served.get(source)
            assert asset.status_code == 200
            assert len(asset.content) > 1000
    assert "swagger-ui" in served.get("/").text


def test_pages_can_be_left_out(serve: Any) -> None:
    served = serve(has_docs=False)
    assert [served.get(path).status_code for path in ("/", "/redoc", "/openapi.json")] == [404, 404, 404]


def test_every_endpoint_is_documented(serve: Any) -> None:
    schema = serve().get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/embeddings", "/generate"} <= set(
        schema["paths"]
    )
    fields = schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "temperature", "logit_bias", "max_completion_tokens"} <= set(fields)


def test_administration_is_not_there(serve: Any) -> None:
    served = serve()
    for path in ("/terminate", "/sleep", "/wakeup", "/update_weights", "/abort_request"):
        answer = served.post(path, {})
        assert (answer.status_code, error_of(answer)["code"]) == (404, 404)
