"""What the proxy itself says to a client whose request no node has answered. It knows no node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from lmdeploy.errors import LMDeployError
from lmdeploy.serve.errors import Problem

# LMDeploy's numbers for the proxy's own failures.
MODEL_NOT_FOUND, SERVICE_UNAVAILABLE, API_TIMEOUT = 10400, 10401, 10402
_MAX_NAMES = 20
_RETRY_AFTER_S = 2


@dataclass(frozen=True)
class ProxyProblem(Problem):
    """A Problem with LMDeploy's number for it, in the fields that its first proxy used."""

    error_code: int | None = None

    def body(self) -> dict[str, Any]:
        numbered = {} if self.error_code is None else {"error_code": self.error_code, "text": self.message}
        return {**super().body(), **numbered}


class Refused(LMDeployError):
    """A request that the proxy answers itself."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def no_such_model(name: str | None, known: Sequence[str]) -> Refused:
    """known: the models that there are, of which there is at least one."""
    names = ", ".join(known[:_MAX_NAMES]) + (", ..." if len(known) > _MAX_NAMES else "")
    if name is None:
        message = f"say in the field `model` which model is meant; there are {names}"
        return Refused(Problem(400, message, "invalid_request_error", 400, "model"))
    message = f"the model {name[:200]!r} is not served here; there are {names} (GET /v1/models)"
    return Refused(
        ProxyProblem(404, message, "invalid_request_error", "model_not_found", "model", error_code=MODEL_NOT_FOUND)
    )


def unavailable(message: str) -> Refused:
    return Refused(
        ProxyProblem(
            503, message, "service_unavailable", 503, retry_after_s=_RETRY_AFTER_S, error_code=SERVICE_UNAVAILABLE
        )
    )


def timed_out(message: str) -> Refused:
    return Refused(ProxyProblem(504, message, "timeout_error", 504, error_code=API_TIMEOUT))


def last_event(path: str, media_type: str, problem: Problem) -> bytes:
    """How a stream that has begun ends with an error, in the form that clients of the path expect; empty if there is none."""
    if media_type == "application/x-ndjson":
        return msgspec.json.encode(problem.body()) + b"\n"
    if media_type != "text/event-stream":
        return b""
    if path == "/v1/messages":
        body = problem.typed_body()
    elif path == "/v1/responses":
        body = {"type": "error", "code": "server_error", "message": problem.message, "param": None}
    else:
        return b"data: %b\n\ndata: [DONE]\n\n" % msgspec.json.encode(problem.body())
    return b"event: error\ndata: %b\n\n" % msgspec.json.encode(body)
