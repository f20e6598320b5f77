"""Administration: sleep and wake, other weights, aborting and ending. Not there unless the server was told to have it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr
from starlette.responses import Response as HttpResponse

from lmdeploy.engine.control import TAGS
from lmdeploy.errors import CheckpointError, ConfigError, InvalidParameter
from lmdeploy.serve.errors import Forbidden, json_response
from lmdeploy.serve.openai.protocol import SessionId
from lmdeploy.serve.openai.scope import service_of
from lmdeploy.serve.settings import ServerSettings

_TAGS = sorted(TAGS)


class AbortRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")

    abort_all: StrictBool = False
    session_id: SessionId | None = None


class UpdateWeightsRequest(BaseModel):
    """path: of a folder with safetensors files and config.json, below the folder that the server was started with."""

    model_config = ConfigDict(extra="forbid")

    path: Annotated[StrictStr, Field(min_length=1, max_length=4096)]


def admin_router(settings: ServerSettings) -> APIRouter:
    """The endpoints that these settings open; the administrator's key is asked for unless a flag opens one to all."""
    router = APIRouter(tags=["Administration"])
    guarded = [Depends(_require_admin)]
    has_admin = settings.admin_api_key is not None
    if has_admin:
        router.post("/sleep", dependencies=guarded)(sleep)
        router.post("/wakeup", dependencies=guarded)(wakeup)
        router.post("/update_weights", dependencies=guarded)(update_weights)
    if has_admin or settings.allow_abort:
        router.post("/abort_request", dependencies=[] if settings.allow_abort else guarded)(abort_request)
    if has_admin or settings.allow_terminate:
        router.get("/terminate", dependencies=[] if settings.allow_terminate else guarded)(terminate)
    return router


def _require_admin(request: Request) -> None:
    if not request.scope.get("state", {}).get("is_admin", False):
        raise Forbidden("give the server's admin key in the header `Authorization: Bearer KEY`")


async def sleep(request: Request, level: Annotated[int, Query(ge=1, le=2)] = 1) -> HttpResponse:
    """Give back the KV cache, and what else of the GPU; level 2: the weights in any case. Requests get 503 meanwhile."""
    await service_of(request).sleep(level)
    return json_response({"is_sleeping": True})


async def wakeup(
    request: Request,
    tags: Annotated[list[Literal["weights", "kv_cache"]], Query(max_length=8)] = _TAGS,  # type: ignore[assignment]
) -> HttpResponse:
    service = service_of(request)
    try:
        await service.wake(frozenset(tags))
    except ConfigError as error:
        raise InvalidParameter(str(error)) from None
    return json_response({"is_sleeping": bool(service.asleep)})


async def update_weights(body: UpdateWeightsRequest, request: Request) -> HttpResponse:
    try:
        await service_of(request).update_weights(Path(body.path))
    except (CheckpointError, ConfigError) as error:
        raise InvalidParameter(str(error)) from None
    return json_response({"success": True})


async def abort_request(body: AbortRequest, request: Request) -> HttpResponse:
    """End the answers of one session, or with abort_all every answer."""
    if not body.abort_all and body.session_id is None:
        raise InvalidParameter("give a session_id, or abort_all=true")
    count = service_of(request).abort_all(None if body.abort_all else body.session_id)
    return json_response({"success": True, "num_aborted": count})


async def terminate(request: Request) -> HttpResponse:
    """As the first SIGTERM: nothing new is taken, what runs ends, then the server does."""
    service_of(request).is_draining = True
    return json_response({"success": True})
