"""What a server says of itself: its model, its health, its counters."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response as HttpResponse

from lmdeploy.serve.errors import json_response
from lmdeploy.serve.openai.scope import service_of
from lmdeploy.serve.service import Service

ModelName = Annotated[str, Path(max_length=4096)]
router = APIRouter(tags=["Status"])
metrics_router = APIRouter(tags=["Status"])


@router.get("/v1/models")
async def models(request: Request) -> HttpResponse:
    return json_response({"object": "list", "data": [_card(service_of(request))]})


@router.get("/v1/models/{name:path}")
async def model(name: ModelName, request: Request) -> HttpResponse:
    service = service_of(request)
    service.check_model(name)
    return json_response(_card(service))


@router.get("/health")
async def health(request: Request) -> HttpResponse:
    """200 while the step loop beats or the engine sleeps, 503 once it does neither."""
    service = service_of(request)
    problem = service.problem()
    if problem is None and service.asleep:
        return json_response({"status": "sleeping", "message": "the engine sleeps: POST /wakeup"})
    return _report(problem)


@router.get("/health/live")
async def live() -> HttpResponse:
    """200 as long as the server's process answers at all."""
    return _report(None)


@router.get("/health/ready")
async def ready(request: Request) -> HttpResponse:
    """200 while new requests are taken."""
    service = service_of(request)
    if service.is_draining or service.asleep:
        return _report("shutting down" if service.is_draining else "the engine sleeps")
    return _report(service.problem())


@router.get("/is_sleeping")
async def is_sleeping(request: Request) -> HttpResponse:
    return json_response({"is_sleeping": bool(service_of(request).asleep)})


@metrics_router.get("/metrics")
async def metrics(request: Request) -> HttpResponse:
    return HttpResponse(service_of(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _report(problem: str | None) -> HttpResponse:
    if problem is None:
        return json_response({"status": "healthy", "message": "the server is healthy"})
    return json_response({"status": "unhealthy", "message": problem}, 503)


def _card(service: Service) -> dict[str, Any]:
    name = service.settings.model_name
    permission = {
        "id": f"modelperm-{service.created}",
        "object": "model_permission",
        "created": service.created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "lmdeploy",
        "root": name,
        "parent": None,
        "max_model_len": service.engine.client.info.session_len,
        "permission": [permission],
    }
