"""`/nodes/*`: who joins and leaves. It knows nothing of how requests are routed."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any

import httpx2
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from lmdeploy.errors import InvalidParameter
from lmdeploy.serve.errors import json_response, refusal
from lmdeploy.serve.proxy.proxy import Proxy
from lmdeploy.serve.proxy.refusals import Refused
from lmdeploy.serve.proxy.registry import MAX_MODELS

router = APIRouter(prefix="/nodes")
_TERMINATE_TIMEOUT_S = 10.0

ModelName = Annotated[str, Field(min_length=1, max_length=512)]


class Status(BaseModel):
    """What a node says of itself. What else LMDeploy's status has, `unfinished` and `latency`, the proxy counts itself."""

    models: list[ModelName] = Field(default=[], max_length=MAX_MODELS)
    role: str | int = "Hybrid"
    speed: float | None = Field(default=None, gt=0, le=1e9)


class NodeBody(BaseModel):
    url: str = Field(max_length=300)
    status: Status | None = None


class UrlBody(BaseModel):
    url: str = Field(max_length=300)


def proxy_of(request: Request) -> Proxy:
    proxy = request.app.state.service
    assert isinstance(proxy, Proxy)
    return proxy


@router.get("/status")
async def status(request: Request) -> Response:
    """Every node with its models, load and latencies."""
    return json_response({url: node.report() for url, node in proxy_of(request).registry.nodes.items()})


@router.post("/add")
async def add(body: NodeBody, request: Request) -> Response:
    """A node that joins, or that says again that it is there."""
    given = body.status or Status()
    if given.role not in ("Hybrid", 1):
        raise InvalidParameter(f"role {given.role!r} is not supported; a node does both prefill and decode: Hybrid")
    node = await proxy_of(request).registry.add(body.url, given.models, given.speed)
    return json_response({"url": node.url, **node.report()})


@router.post("/remove")
async def remove(
    request: Request, body: UrlBody | None = None, node_url: Annotated[str | None, Query(max_length=300)] = None
) -> Response:
    """A node gets no new requests; what it has begun goes on. Its address comes in the body or as ?node_url=."""
    node = proxy_of(request).registry.remove(_given(body, node_url))
    return json_response({"url": node.url, "removed": True})


@router.post("/terminate")
async def terminate(
    request: Request, body: UrlBody | None = None, node_url: Annotated[str | None, Query(max_length=300)] = None
) -> Response:
    """A node is removed and asked to end; it does if it runs with --allow-terminate-by-client."""
    _check_may_terminate(request)
    node = proxy_of(request).registry.remove(_given(body, node_url))
    return json_response(await _terminate(request, [node.url]))


@router.get("/terminate_all")
async def terminate_all(request: Request) -> Response:
    """The same for every node."""
    _check_may_terminate(request)
    registry = proxy_of(request).registry
    return json_response(await _terminate(request, [registry.remove(url).url for url in list(registry.nodes)]))


async def _terminate(request: Request, urls: Sequence[str]) -> dict[str, Any]:
    """Whether each of the nodes has said that it will end."""
    proxy = proxy_of(request)
    told = {}
    for url in urls:
        try:
            answer = await proxy.client.get(
                f"{url}/terminate", headers=proxy.registry.headers, timeout=_TERMINATE_TIMEOUT_S
            )
            told[url] = "ends" if answer.is_success else f"refuses: {HTTPStatus(answer.status_code).phrase}"
        except (httpx2.HTTPError, ValueError):
            told[url] = "does not answer"
    return told


def _check_may_terminate(request: Request) -> None:
    """Without keys anyone, any web page included, could end the servers."""
    settings = proxy_of(request).settings
    if not settings.api_keys and settings.admin_api_key is None:
        raise Refused(refusal(404, "this needs a proxy with --api-keys or --admin-api-key"))


def _given(body: UrlBody | None, node_url: str | None) -> str:
    url = node_url if body is None else body.url
    if url is None:
        raise InvalidParameter("give the node's url")
    return url
