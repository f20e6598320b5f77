"""The proxy's endpoints: those of a server, sent on by their model, and the proxy's own word on its health."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, FastAPI, Path, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from lmdeploy.errors import InvalidParameter
from lmdeploy.serve import errors
from lmdeploy.serve.connection import while_connected
from lmdeploy.serve.errors import ClientGone, UnknownItem, UnknownModel, json_response
from lmdeploy.serve.middleware import Authentication, BodyLimits
from lmdeploy.serve.proxy import nodes
from lmdeploy.serve.proxy.ask import RESPONSES, Ask, read_ask, to_send
from lmdeploy.serve.proxy.proxy import Proxy
from lmdeploy.serve.proxy.refusals import Refused
from lmdeploy.version import __version__

# Every endpoint of a server that concerns one model and changes nothing for others.
FORWARDED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    RESPONSES,
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/encode",
    "/v1/chat/interactive",
    "/generate",
    "/pooling",
    "/get_ppl",
    "/tokenize",
    "/detokenize",
)

router = APIRouter()


def create_app(proxy: Proxy) -> FastAPI:
    """An ASGI application, to be run within `proxy.running()`. `app.state.service` is the proxy."""
    app = FastAPI(title="LMDeploy proxy", version=__version__, openapi_url=None)
    app.state.service = proxy
    errors.install(app)
    app.add_exception_handler(Refused, _on_refused)
    for path in FORWARDED:
        app.add_api_route(path, _forward, methods=["POST"])
    app.include_router(router)
    app.include_router(nodes.router)
    settings = proxy.settings
    # The last that is added is the first that a request meets.
    app.add_middleware(BodyLimits, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    app.add_middleware(Access, api_keys=settings.api_keys, admin_api_key=settings.admin_api_key)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allow_origins, allow_methods=["*"], allow_headers=["*"]
        )
    return app


class Access:
    """Keys as on a server; what is under /nodes needs the administrator's key where there is one."""

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...], admin_api_key: str | None) -> None:
        self._models = Authentication(app, api_keys)
        self._nodes = Authentication(app, api_keys if admin_api_key is None else (admin_api_key,))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_administration = scope["type"] == "http" and scope["path"].startswith("/nodes")
        await (self._nodes if is_administration else self._models)(scope, receive, send)


class Forwarded(Response):
    """An answer that a node gives. It ends with its client's connection, and the node's work with it."""

    def __init__(self, proxy: Proxy, ask: Ask) -> None:
        super().__init__()
        self._proxy = proxy
        self._ask = ask

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(self._proxy.forward(self._ask, send), receive)
        except ClientGone:
            self._proxy.metrics.disconnects.inc()


async def _forward(request: Request) -> Response:
    if request.url.query:
        raise InvalidParameter("this endpoint takes no query; put everything into the body")
    tenant = str(request.scope.get("state", {}).get("tenant", ""))
    ask = read_ask(request.scope["path"], await request.body(), request.scope["headers"], tenant)
    return Forwarded(nodes.proxy_of(request), ask)


@router.get(RESPONSES + "/{response_id}")
@router.delete(RESPONSES + "/{response_id}")
async def stored_response(response_id: Annotated[str, Path(max_length=200)], request: Request) -> Response:
    """An answer that some node has kept."""
    proxy = nodes.proxy_of(request)
    home = proxy.homes.find(response_id, list(proxy.registry.nodes.values()))
    if home is None:
        raise UnknownItem(f"there is no response {response_id!r} (any more)")
    fields = {"previous_response_id": response_id}
    path = f"{RESPONSES}/{response_id}"
    ask = Ask(path, b"", fields, to_send(request.scope["headers"]), home.models[0], method=request.method)
    return Forwarded(proxy, ask)


async def _on_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.problem.response(request.scope["path"])


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The models of all nodes, also of those that do not answer just now."""
    proxy = nodes.proxy_of(request)
    return json_response({"object": "list", "data": [_card(name, proxy) for name in proxy.registry.models()]})


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Response:
    proxy = nodes.proxy_of(request)
    if name not in proxy.registry.models():
        raise UnknownModel(f"the model {name[:200]!r} is not served here (GET /v1/models)")
    return json_response(_card(name, proxy))


@router.get("/health")
@router.get("/health/live")
async def health() -> Response:
    """200 as long as the proxy answers at all."""
    return json_response({"status": "healthy", "message": "the proxy is healthy"})


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """200 while new requests are taken and some node is there."""
    problem = nodes.proxy_of(request).problem()
    if problem is None:
        return json_response({"status": "healthy", "message": "the proxy is ready"})
    return json_response({"status": "unhealthy", "message": problem}, 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    proxy = nodes.proxy_of(request)
    content = proxy.metrics.render(proxy.registry.nodes.values(), proxy.num_active)
    return Response(content, media_type=CONTENT_TYPE_LATEST)


def _card(name: str, proxy: Proxy) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": proxy.created,
        "owned_by": "lmdeploy",
        "root": name,
        "parent": None,
    }
