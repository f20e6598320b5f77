"""From the package's exceptions to HTTP: status, code and a text that is fit for strangers. It knows no endpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lmdeploy.errors import EngineDead, LMDeployError, PromptTooLong, RequestError

_INVALID_REQUEST = "invalid_request_error"
_MAX_MESSAGE_CHARS = 2000
_MAX_FINDINGS = 5
# A step on a field's path; a place of pydantic's own names a form that it tried, such as `list[constrained-int]` or `bool`.
_FIELD = re.compile(r"[a-z0-9_]+")
_FORMS = {"bool", "int", "float", "str"}
# Where clients expect Anthropic's errors, and the names these have there.
_TYPED_PATHS = ("/v1/messages", "/anthropic/")
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class UnknownModel(RequestError):
    """The request names a model that is not served here."""


class UnknownItem(RequestError):
    """The request asks for something that is not there, or not any more."""


class Overloaded(LMDeployError):
    """The bounded queue has no room for the request now."""


class Draining(LMDeployError):
    """The server finishes what runs and takes nothing new."""


class Sleeping(LMDeployError):
    """The engine has given its memory back until it is woken."""


class Forbidden(LMDeployError):
    """The request asks for administration without the key for that."""


class AnswerFailed(LMDeployError):
    """The engine failed on one answer, through no fault of the request."""


class ClientGone(Exception):
    """The client has closed its connection; whatever is answered, nobody reads it."""


@dataclass(frozen=True)
class Problem:
    """An error as a client sees it. code: a word or the status. retry_after_s: for the Retry-After header."""

    status: int
    message: str
    type: str
    code: str | int
    param: str | None = None
    retry_after_s: int | None = None

    def body(self) -> dict[str, Any]:
        """OpenAI's form under `error`, and LMDeploy's flat form beside it."""
        flat = {"message": self.message[:_MAX_MESSAGE_CHARS], "type": self.type, "param": self.param, "code": self.code}
        return {"object": "error", **flat, "error": flat}

    def typed_body(self) -> dict[str, Any]:
        """Anthropic's form."""
        kind = _TYPES.get(self.status, "api_error" if self.status >= 500 else _INVALID_REQUEST)
        return {"type": "error", "error": {"type": kind, "message": self.message[:_MAX_MESSAGE_CHARS]}}

    def response(self, path: str = "") -> Response:
        """path: of the request; that decides the body's form."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        is_typed = path.startswith(_TYPED_PATHS)
        return json_response(self.typed_body() if is_typed else self.body(), self.status, headers)


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`content`, of dicts, lists, dataclasses and scalars, as JSON."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def problem_of(error: Exception) -> Problem:
    """What a client hears of an error: its own mistakes in full, of the server's nothing but that there was one."""
    if isinstance(error, UnknownModel):
        return Problem(404, str(error), _INVALID_REQUEST, "model_not_found", "model")
    if isinstance(error, UnknownItem):
        return Problem(404, str(error), _INVALID_REQUEST, "not_found")
    if isinstance(error, Forbidden):
        return Problem(401, str(error), "authentication_error", "invalid_api_key")
    if isinstance(error, PromptTooLong):
        return Problem(400, str(error), _INVALID_REQUEST, "context_length_exceeded")
    if isinstance(error, RequestError):
        return Problem(400, str(error), _INVALID_REQUEST, 400)
    if isinstance(error, Overloaded):
        return Problem(429, str(error), "rate_limit_error", "queue_full", retry_after_s=1)
    if isinstance(error, Draining):
        return Problem(503, str(error), "service_unavailable", 503, retry_after_s=5)
    if isinstance(error, Sleeping):
        return Problem(503, str(error), "service_unavailable", "sleeping", retry_after_s=5)
    if isinstance(error, EngineDead):
        return Problem(503, "the engine has stopped; the server has to be restarted", "service_unavailable", 503)
    return Problem(500, "the server failed on this request; its log says why", "internal_error", 500)


def refusal(status: int, message: str, param: str | None = None) -> Problem:
    """A request that is refused before it reaches the engine."""
    return Problem(status, message, _INVALID_REQUEST, status, param)


def install(app: FastAPI) -> None:
    """Answer every exception that a handler of this app raises."""

    async def on_error(request: Request, error: Exception) -> Response:
        return problem_of(error).response(request.scope["path"])

    async def on_failure(request: Request, error: Exception) -> Response:
        """Outside every middleware, and so without the id that one of them adds."""
        answer = await on_error(request, error)
        if request_id := request.scope.get("state", {}).get("request_id"):
            answer.headers["x-request-id"] = request_id
        return answer

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _validation_problem(error).response(request.scope["path"])

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = refusal(error.status_code, str(error.detail)).response(request.scope["path"])
        answer.headers.update(error.headers or {})
        return answer

    async def on_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    app.add_exception_handler(LMDeployError, on_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientGone, on_gone)
    app.add_exception_handler(Exception, on_failure)


def _validation_problem(error: RequestValidationError) -> Problem:
    """Where and what, never the value: that may be long, or secret."""
    found: dict[str, list[str]] = {}
    for item in error.errors()[:_MAX_FINDINGS]:
        texts = found.setdefault(_field_of(item["loc"]), [])
        if item["msg"] not in texts:
            texts.append(item["msg"])
    # Of a field that may have several forms, what was found deepest is about the one that the client meant.
    fields = [where for where in found if not any(other.startswith(f"{where}.") for other in found)]
    told = [(f"{where}: " if where else "") + ", or ".join(found[where]) for where in fields]
    return refusal(400, "; ".join(told) or "the request is malformed", fields[0] or None if fields else None)


def _field_of(location: Sequence[str | int]) -> str:
    """The field's path as the client wrote it, without the forms that pydantic tried for it."""
    parts = [str(part) for part in location if part not in ("body", "query", "path")]
    return ".".join(part for part in parts if _FIELD.fullmatch(part) and part not in _FORMS)
