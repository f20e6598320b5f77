"""Models, health, metrics, and pages that need no network."""

from __future__ import annotations

import re
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.serve.driver import error_of

# Names that clients of LMDeploy's /metrics look for, less those that need numbers which this engine does not keep.
METRICS = {
    "num_requests_succeeded", "num_requests_failed", "num_requests_running", "num_requests_waiting", "gpu_cache_usage_perc",
    "prefix_cache_hit_rate", "prompt_tokens", "generation_tokens", "cached_tokens", "request_success",
    "request_prompt_tokens", "request_generation_tokens", "request_cached_tokens", "time_to_first_token_seconds",
    "time_per_output_token_seconds", "e2e_request_latency_seconds",
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
    served.client.close()
    assert values(served)["lmdeploy:num_requests_succeeded"] == 1


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
