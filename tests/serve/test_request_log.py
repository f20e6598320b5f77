"""The id that every answer bears, and the log as lines of JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from lmdeploy.logging import get_logger
from lmdeploy.serve.request_log import JsonFormatter, log_as_json
from tests.serve.driver import endless

LOGGERS = ("lmdeploy", "lmdeploy.requests", "uvicorn", "uvicorn.error", "uvicorn.access")


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """What is logged as JSON; every logger is afterwards as it was."""
    own = get_logger()
    found: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(self.format(record)))

    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    own.handlers = [Keep()]
    log_as_json()
    yield found
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.parametrize("given", ["abc-1.2:X_9", None, "", "x" * 129, "a b", "{}", "é"])
def test_an_answer_bears_the_id_of_its_request(serve: Any, given: str | None) -> None:
    headers = {} if given is None else {"X-Request-Id": given.encode()}
    answer = serve(endless).get("/v1/models", headers=headers)
    request_id = answer.headers["x-request-id"]
    assert request_id == answer.headers["request-id"]
    assert (request_id == given) == (given == "abc-1.2:X_9")
    assert len(request_id) in (len("abc-1.2:X_9"), 32)


@pytest.mark.parametrize(("path", "status"), [("/no/such", 404), ("/v1/models", 401), ("/fails", 500)])
def test_refusals_and_failures_bear_one_too(serve: Any, path: str, status: int) -> None:
    served = serve(endless, api_keys=("k",) if status == 401 else ())

    @served.app.get("/fails")
    async def fail() -> None:
        raise RuntimeError("secret")

    answer = served.get(path, headers={"x-request-id": "my-id"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (status, "my-id")


def test_one_line_a_request(serve: Any, lines: list[dict[str, Any]]) -> None:
    served = serve(endless, has_request_log=True)
    served.get("/health", headers={"x-request-id": "first"})
    served.chat(temperature=9)
    served.chat(max_tokens=2, stream=True)
    shown = [(line["method"], line["path"], line["status"]) for line in lines if "status" in line]
    chat = "/v1/chat/completions"
    assert shown == [("GET", "/health", 200), ("POST", chat, 400), ("POST", chat, 200)]
    assert lines[0]["request_id"] == "first"
    assert lines[0]["seconds"] < 5
    assert all(line["level"] == "INFO" and line["time"] for line in lines)
    assert not any("hello" in json.dumps(line) for line in lines)  # what was said is nobody's business


def test_without_the_option_nothing_is_logged(serve: Any, lines: list[dict[str, Any]]) -> None:
    serve(endless).get("/health")
    assert not [line for line in lines if "status" in line]


def test_a_line_holds_whatever_was_logged() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
        record = logging.LogRecord("lmdeploy", logging.ERROR, "file", 1, 'a "%s"\n\x00', ("b",), info)
    text = JsonFormatter().format(record)
    assert "\n" not in text
    event = json.loads(text)
    assert event["message"] == 'a "b"\n\x00'
    assert "two\nlines" in event["exception"]


def test_uvicorn_speaks_json_too(lines: list[dict[str, Any]]) -> None:
    logging.getLogger("uvicorn.error").error("a server's word")
    logging.getLogger("uvicorn.access").error("never seen: the line a request is ours")
    assert [line["message"] for line in lines] == ["a server's word"]
