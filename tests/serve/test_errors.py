"""Every class of the exception tree over HTTP, and bodies that no client should send."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from lmdeploy import errors
from lmdeploy.engine.request import Request
from lmdeploy.errors import EngineDead, LMDeployError
from lmdeploy.serve import errors as http
from tests.serve.driver import HELLO, endless, error_of, events

SECRET = "at /home/someone/model, line 7"
STATUS = {
    errors.ConfigError: 500,
    errors.ModelNotSupported: 500,
    errors.CheckpointError: 500,
    errors.RequestError: 400,
    errors.InvalidParameter: 400,
    errors.PromptTooLong: 400,
    errors.InvalidGrammar: 400,
    errors.EngineDead: 503,
    http.UnknownModel: 404,
    http.UnknownItem: 404,
    http.Forbidden: 401,
    http.Sleeping: 503,
    http.Overloaded: 429,
    http.Draining: 503,
    http.AnswerFailed: 500,
}


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


def test_the_table_is_complete() -> None:
    # A class of another command's module, if such a module is loaded, is the server's own fault and told as such.
    tree = {
        kind for kind in subclasses(LMDeployError) if kind.__module__ in ("lmdeploy.errors", "lmdeploy.serve.errors")
    }
    assert tree == {*STATUS, LMDeployError}
    assert http.problem_of(LMDeployError(SECRET)).status == 500


@pytest.mark.parametrize("kind", STATUS, ids=lambda kind: kind.__name__)
def test_every_class_has_its_status(kind: type[LMDeployError], serve: Any) -> None:
    served = serve()

    @served.app.get("/fails")
    async def fail() -> None:
        raise kind(SECRET)

    answer = served.get("/fails")
    assert answer.status_code == STATUS[kind]
    is_own_fault = issubclass(
        kind, (errors.RequestError, http.Overloaded, http.Draining, http.Forbidden, http.Sleeping)
    )
    assert (SECRET in answer.text) == is_own_fault
    assert ("retry-after" in answer.headers) == (kind in (http.Overloaded, http.Draining, http.Sleeping))
    assert error_of(answer)["type"]


def test_an_unforeseen_exception_tells_nothing(serve: Any) -> None:
    served = serve()

    @served.app.get("/fails")
    async def fail() -> None:
        raise ZeroDivisionError(SECRET)

    answer = served.get("/fails")
    assert answer.status_code == 500
    assert SECRET not in answer.text
    assert error_of(answer)["type"] == "internal_error"


def test_codes_that_clients_look_for(serve: Any) -> None:
    served = serve(client={"session_len": 20})
    long = served.chat(messages="a " * 30)
    assert (long.status_code, error_of(long)["code"]) == (400, "context_length_exceeded")
    assert error_of(long)["type"] == "invalid_request_error"
    unknown = served.complete(model="gpt-4")
    assert (unknown.status_code, error_of(unknown)["code"], error_of(unknown)["param"]) == (
        404,
        "model_not_found",
        "model",
    )
    assert error_of(served.get("/no/such/path"))["code"] == 404
    assert served.get("/v1/completions").status_code == 405


def test_errors_before_the_first_event_have_their_status(serve: Any) -> None:
    served = serve(client={"session_len": 20})
    answer = served.chat(messages="a " * 30, stream=True)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")


def test_an_engine_that_dies_ends_streams_with_an_error(serve: Any) -> None:
    def dies(request: Request) -> Any:
        yield from request.prompt_ids[:3]
        served.client.die(EngineDead(SECRET))

    served = serve(dies)
    chunks = events(served.complete(prompt="the river runs", stream=True))
    assert chunks[-1]["error"]["type"] == "service_unavailable"
    assert SECRET not in json.dumps(chunks)
    for answer in (served.complete(), served.complete(stream=True), served.get("/health")):
        assert answer.status_code == 503
        assert SECRET not in answer.text
    assert served.service.num_active == 0


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe", b'{"model": "tiny", "prompt": "\\ud800"}', b'{"a": NaN}',
        b"[" * 100_000, b'{"a":' * 50_000, b'{"model": "tiny", "prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', b'{"model": "tiny", "prompt": "a", "n": 129}',
        b'{"model": "tiny", "prompt": "a", "n": 1.5}', b'{"model": "tiny", "prompt": "a", "max_tokens": -1}',
        b'{"model": "tiny", "prompt": "a", "logit_bias": {"x": 1}}', b'{"model": "tiny", "prompt": "a", "stop": [""]}',
        b'{"model": "tiny", "prompt": "a", "logit_bias": {"5": 101}}', b'{"model": 5, "prompt": "a"}',
        b'{"model": "tiny", "prompt": "a", "logit_bias": {"99999": 1}}', b'{"prompt": "a"}',
    ],
)  # fmt: skip
def test_hostile_bodies(serve: Any, body: bytes) -> None:
    answer = serve().ask("POST", "/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert len(error_of(answer)["message"]) in range(1, 2001)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"), ({"top_k": -1}, "top_k"), ({"min_p": 2}, "min_p"), ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"), ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"), ({"top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"), ({"seed": 1 << 63}, "seed"), ({"stream": 1}, "stream"),
        ({"stop": ["x"] * 65}, "stop"), ({"logit_bias": {str(i): 1 for i in range(4097)}}, "logit_bias"),
    ],
)  # fmt: skip
def test_numbers_and_lists_have_bounds(serve: Any, fields: dict[str, Any], param: str) -> None:
    answer = serve().chat(**fields)
    assert answer.status_code == 400
    assert error_of(answer)["param"].startswith(param)
    assert param in error_of(answer)["message"]


def test_other_media_types(serve: Any) -> None:
    served = serve()
    body = json.dumps({"model": "tiny", "prompt": "a"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = served.ask("POST", "/v1/completions", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 400
        assert "application/json" in error_of(answer)["message"]
    kind = "application/json; charset=utf-8"
    assert served.ask("POST", "/v1/completions", content=body, headers={"Content-Type": kind}).status_code == 200


def test_an_answer_without_a_finite_logit_is_the_requests_fault(serve: Any) -> None:
    """What the engine reports of one request alone, while others go on."""
    served = serve(endless)
    counter = itertools.count()
    deliver_all = served.client._step

    def step(running: Any) -> Any:
        output = deliver_all(running)
        if next(counter) == 2:
            output.finish_reason, output.error, output.token_ids = "error", errors.RequestError("no finite logit"), []
        return output

    served.client._step = step
    answer = served.complete(max_tokens=20)
    assert (answer.status_code, error_of(answer)["message"]) == (400, "no finite logit")
    assert served.complete(max_tokens=20).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": 1, "content": "a"}]}, "messages.0.role"),
        ("/v1/chat/completions", {"messages": HELLO, "stop": ""}, "stop"),
        ("/v1/chat/completions", {"messages": HELLO, "stop": ["a", 1]}, "stop.1"),
        ("/v1/chat/completions", {"messages": HELLO, "tool_choice": "perhaps"}, "tool_choice"),
        ("/v1/completions", {"prompt": [[-1]]}, "prompt.0.0"),
        ("/v1/responses", {"input": 3}, "input"),
    ],
)
def test_a_field_has_the_name_that_the_client_gave_it(
    serve: Any, path: str, fields: dict[str, Any], param: str
) -> None:
    """And not one of the forms that were tried for it, such as list[constrained-str]."""
    error = error_of(serve().post(path, {"model": "tiny", **fields}))
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert "constrained" not in error["message"]
