"""Requests made up from the OpenAPI document, and bodies made up by hand: answers or refusals, never a failure or a hang."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serve.driver import Served

# What a client may get. 501 to 504 but 503 are no answers of this server's.
ALLOWED = {200, 400, 401, 404, 405, 406, 408, 413, 415, 429, 503}
SLOWEST_S = 20.0
NUM_OPERATIONS = 25

BODIES = {
    "/v1/chat/completions": b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2%b}',
    "/v1/completions": b'{"model": "tiny", "prompt": "hi"%b}',
    "/v1/responses": b'{"model": "tiny", "input": "hi", "max_output_tokens": 2%b}',
    "/v1/messages": b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2%b}',
    "/v1/chat/interactive": b'{"prompt": "hi", "request_output_len": 2%b}',
    "/v1/embeddings": b'{"model": "tiny", "input": "hi"%b}',
    "/generate": b'{"prompt": "hi", "max_tokens": 2%b}',
}
DEEP = 5000
EVIL = {
    "bytes that are no UTF-8": b', "user": "\xff\xfe"',
    "half a surrogate pair": b', "user": "\\ud800"',
    "not a number": b', "temperature": NaN',
    "infinity": b', "temperature": Infinity',
    "an integer of 5000 digits": b', "seed": ' + b"9" * 5000,
    "deep lists": b', "metadata": ' + b"[" * DEEP + b"]" * DEEP,
    "deep objects": b', "metadata": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "an end that is missing": b', "user": "',
    "two bodies": b"}{",
    "a null byte": b"\x00",
    "a lone comma": b",",
}
OUT_OF_BOUNDS = [
    b', "temperature": -1', b', "top_p": 2', b', "top_k": -5', b', "seed": 99999999999999999999', b', "stop": [1]',
    b', "temperature": 1e999', b', "top_k": 1e3', b', "temperature": "1"x', b', "stream": "yes"', b', "logit_bias": {"x": "y"}',
]  # fmt: skip


def fuzz(served: Served, examples: int) -> Counter[int]:
    """Ask each endpoint so many times; the statuses that came."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", served.app)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= NUM_OPERATIONS
    statuses: Counter[int] = Counter()
    for operation in operations:

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def run(case: Any) -> None:
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = "tiny"  # a made-up name is refused before anything else is looked at
            started = time.monotonic()
            status = case.call().status_code
            statuses[status] += 1
            assert status in ALLOWED, (status, case.method, case.path, case.body)
            assert time.monotonic() - started < SLOWEST_S, (case.method, case.path, case.body)

        run()
    return statuses


def fuzzed(serve: Any) -> Served:
    served: Served = serve(admin_api_key="the admin", client={"max_batch_size": 64})
    return served


def check_left_nothing(served: Served) -> None:
    assert served.client.wait_idle()
    assert (served.service.num_active, served.service.num_tokens) == (0, 0)
    assert served.get("/health").status_code == 200


def test_requests_out_of_the_openapi_document(serve: Any) -> None:
    served = fuzzed(serve)
    statuses = fuzz(served, 5)
    assert statuses[200] > 10
    assert sum(statuses.values()) >= 90
    check_left_nothing(served)


@pytest.mark.slow
def test_two_thousand_requests_out_of_the_openapi_document(serve: Any) -> None:
    served = fuzzed(serve)
    statuses: Counter[int] = Counter()
    while sum(statuses.values()) < 2000:
        statuses += fuzz(served, 80)
    assert statuses[200] > 100
    check_left_nothing(served)


def post(served: Served, path: str, body: bytes, kind: str = "application/json") -> httpx2.Response:
    return served.ask("POST", path, content=body, headers={"Content-Type": kind})


def check_refusal(answer: httpx2.Response) -> None:
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    body = answer.json()
    assert body["error"]["message"].strip()
    assert len(answer.content) < 10_000


@pytest.mark.parametrize("what", EVIL)
@pytest.mark.parametrize("path", BODIES)
def test_bodies_that_are_no_json_are_refused_with_a_message(serve: Any, path: str, what: str) -> None:
    served = serve()
    check_refusal(post(served, path, BODIES[path] % EVIL[what]))
    assert post(served, path, BODIES[path] % b"").status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/generate"])
def test_fields_out_of_bounds_are_refused_with_a_message(serve: Any, path: str) -> None:
    served = serve()
    for more in OUT_OF_BOUNDS:
        check_refusal(post(served, path, BODIES[path] % more))


@pytest.mark.parametrize("path", BODIES)
def test_bodies_of_another_kind_are_refused(serve: Any, path: str) -> None:
    served = serve()
    for body in (b"null", b"[]", b"7", b'"text"', b"", b"\xef\xbb\xbf{}"):
        check_refusal(post(served, path, body))
    for kind in (
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "application/xml",
    ):
        check_refusal(post(served, path, BODIES[path] % b"", kind))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(sorted(BODIES)), body=st.binary(max_size=200), cut=st.integers(0, 120))
def test_any_bytes_are_refused(serve: Any, path: str, body: bytes, cut: int) -> None:
    served = serve()
    check_refusal(post(served, path, (BODIES[path] % b"")[:cut] + b"\x01" + body))
    served.client.close()
