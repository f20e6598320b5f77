"""Counters of one server under LMDeploy's Prometheus names. It observes Responses and knows no HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from lmdeploy.engine.step_times import read
from lmdeploy.errors import EngineDead
from lmdeploy.messages import Response

_LABELS = ("model_name", "engine")
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_PER_TOKEN_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_WHOLE_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
# As the engine names its histograms, what they are called here, and what they count.
_ENGINE_TIMES = {
    "iteration_tokens": ("iteration_tokens_total", "tokens computed in a step of the engine"),
    "iter_token_latency": ("iter_token_latency", "seconds of the step that gave a token, by token"),
    "queue_time": ("request_queue_time_seconds", "from the engine's queue into its batch"),
    "prefill_time": ("request_prefill_time_seconds", "from the batch to the first token"),
    "decode_time": ("request_decode_time_seconds", "from the first token to the last"),
    "inference_time": ("request_inference_time_seconds", "from the batch to the last token"),
}


class Metrics:
    """What a server has done so far.

    stats: the engine's counters, num_api_routed and num_api_waiting, asked whenever the metrics are. backend: the labels of
    `backend_config`, numbers of the engine that do not change.
    """

    def __init__(
        self, model_name: str, stats: Callable[[], dict[str, float]], backend: Mapping[str, object] | None = None
    ) -> None:
        self._registry = CollectorRegistry()
        self._labels = (model_name, "0")
        self._stats = stats
        self._last_stats: dict[str, float] = {}
        self._registry.register(_EngineTimes(self._labels, lambda: self._last_stats))
        self._describe(backend or {})
        self._num_prompt_tokens = self._num_cached_tokens = 0
        self.succeeded = self._gauge("num_requests_succeeded", "answers that came to their end")
        self.failed = self._gauge("num_requests_failed", "answers that failed or were refused by the engine")
        self._live = {
            "num_running": self._gauge("num_requests_running", "requests in the engine's batch"),
            "num_waiting": self._gauge("num_requests_waiting", "requests that wait for the engine's batch"),
            "num_api_routed": self._gauge("num_api_requests_routed", "answers that the engine works on or has queued"),
            "num_api_waiting": self._gauge(
                "num_api_requests_waiting", "answers that the engine has not been given yet"
            ),
            "num_preemptions": self._gauge(
                "num_preemptions", "requests that gave their blocks back to be computed anew"
            ),
        }
        self._cache_usage = self._gauge("gpu_cache_usage_perc", "share of the KV blocks in use, 0 to 1")
        self._hit_rate = self._gauge("prefix_cache_hit_rate", "share of all prompt tokens found in the prefix cache")
        self._prompt_tokens = self._counter("prompt_tokens", "prompt tokens of ended answers")
        self._generation_tokens = self._counter("generation_tokens", "tokens generated for ended answers")
        self._cached_tokens = self._counter("cached_tokens", "prompt tokens found in the prefix cache")
        self._reasons = Counter(
            "lmdeploy:request_success",
            "ended answers by reason",
            (*_LABELS, "finished_reason"),
            registry=self._registry,
        )
        self._request_prompt = self._histogram("request_prompt_tokens", "prompt tokens of a request", _TOKENS)
        self._request_generation = self._histogram("request_generation_tokens", "tokens of an answer", _TOKENS)
        self._request_cached = self._histogram(
            "request_cached_tokens", "cached prompt tokens of a request", (0, *_TOKENS)
        )
        self._request_ratio = self._histogram(
            "request_cache_hit_ratio", "cached share of a request's prompt tokens, 0 to 1", _SHARES
        )
        self.first_token = self._histogram("time_to_first_token_seconds", "of streamed answers", _FIRST_TOKEN_S)
        self.per_token = self._histogram(
            "time_per_output_token_seconds", "mean after the first, streamed", _PER_TOKEN_S
        )
        self.whole = self._histogram("e2e_request_latency_seconds", "from arrival to the last token", _WHOLE_S)

    def render(self) -> bytes:
        """The text format; of an engine that has stopped, what it had counted."""
        stats = self._engine_stats()
        for name, gauge in self._live.items():
            gauge.set(stats.get(name, 0))
        if blocks := stats.get("num_blocks"):
            self._cache_usage.set(1 - stats["num_free_blocks"] / blocks)
        self._hit_rate.set(self._num_cached_tokens / max(self._num_prompt_tokens, 1))
        return generate_latest(self._registry)

    def observe_end(self, response: Response) -> None:
        """Count an answer by its last Response."""
        if response.finish_reason == "error":
            self.failed.inc()
            return
        self.succeeded.inc()
        self._reasons.labels(*self._labels, response.finish_reason).inc()
        self._num_prompt_tokens += response.input_token_len
        self._num_cached_tokens += response.cached_tokens
        self._prompt_tokens.inc(response.input_token_len)
        self._generation_tokens.inc(response.generate_token_len)
        self._cached_tokens.inc(response.cached_tokens)
        self._request_prompt.observe(response.input_token_len)
        self._request_generation.observe(response.generate_token_len)
        self._request_cached.observe(response.cached_tokens)
        self._request_ratio.observe(response.cached_tokens / max(response.input_token_len, 1))

    def timer(self, is_streaming: bool) -> Timer:
        return Timer(self, is_streaming)

    def _engine_stats(self) -> dict[str, float]:
        try:
            self._last_stats = self._stats()
        except EngineDead:  # nothing runs any more; what its histograms had counted stays
            live = (*self._live, "num_blocks")
            self._last_stats = {name: value for name, value in self._last_stats.items() if name not in live}
        return self._last_stats

    def _describe(self, backend: Mapping[str, object]) -> None:
        text = "the engine's settings, as labels of a 1"
        gauge = Gauge("lmdeploy:backend_config_info", text, (*_LABELS, *backend), registry=self._registry)
        gauge.labels(*self._labels, *backend.values()).set(1)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"lmdeploy:{name}", text, _LABELS, registry=self._registry).labels(*self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"lmdeploy:{name}", text, _LABELS, registry=self._registry).labels(*self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"lmdeploy:{name}", text, _LABELS, registry=self._registry, buckets=buckets)
        return histogram.labels(*self._labels)


class _EngineTimes(Collector):
    """The histograms that the engine keeps itself, as it last told of them."""

    def __init__(self, labels: tuple[str, str], numbers: Callable[[], Mapping[str, float]]) -> None:
        self._labels = labels
        self._numbers = numbers

    def collect(self) -> Iterator[HistogramMetricFamily]:
        numbers = self._numbers()
        for key, (name, text) in _ENGINE_TIMES.items():
            family = HistogramMetricFamily(f"lmdeploy:{name}", text, labels=_LABELS)
            buckets, total = read(numbers, key)
            family.add_metric(self._labels, buckets, total)
            yield family


class Timer:
    """The times of one HTTP request's answers, by their index."""

    def __init__(self, metrics: Metrics, is_streaming: bool) -> None:
        self._metrics = metrics
        self._is_streaming = is_streaming
        self._start = time.monotonic()
        self._first: dict[int, float] = {}

    def observe(self, response: Response) -> None:
        now = time.monotonic()
        metrics = self._metrics
        if self._is_streaming and response.generate_token_len and response.index not in self._first:
            self._first[response.index] = now
            metrics.first_token.observe(now - self._start)
        if response.finish_reason is None:
            return
        metrics.observe_end(response)
        metrics.whole.observe(now - self._start)
        first = self._first.pop(response.index, None)
        if first is not None and response.generate_token_len > 1:
            metrics.per_token.observe((now - first) / (response.generate_token_len - 1))
