"""The application: endpoints, what every request passes before them, the pages that document them."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from lmdeploy.async_engine import AsyncEngine
from lmdeploy.serve import chat_page, errors
from lmdeploy.serve.anthropic import app as anthropic
from lmdeploy.serve.middleware import Authentication, BodyLimits
from lmdeploy.serve.openai import chat, completions, embeddings, interactive, native, responses, status
from lmdeploy.serve.openai.admin import admin_router
from lmdeploy.serve.request_log import RequestIds
from lmdeploy.serve.service import Service
from lmdeploy.serve.settings import ServerSettings
from lmdeploy.version import __version__

_REFUSALS = {
    400: "the request is malformed or out of bounds",
    401: "a key is missing or wrong",
    404: "no such model",
    413: "the body is too large",
    429: "the queue is full; Retry-After says when to ask again",
    503: "the engine has stopped, or the server is shutting down",
}
_ROUTERS = (
    chat.router,
    completions.router,
    responses.router,
    anthropic.router,
    embeddings.router,
    native.router,
    interactive.router,
    status.router,
)


def create_app(engine: AsyncEngine, settings: ServerSettings) -> FastAPI:
    """An ASGI application over a started engine, which stays the caller's to close. `app.state.service` is its Service."""
    pages = FastAPIOffline(docs_url="/", redoc_url="/redoc", title="LMDeploy", version=__version__)
    app = pages if settings.has_docs else FastAPI(openapi_url=None)
    app.state.service = Service(engine, settings)
    errors.install(app)
    for router in (*_ROUTERS, admin_router(settings)):
        app.include_router(router, responses={status: {"description": text} for status, text in _REFUSALS.items()})
    if settings.has_docs:
        app.include_router(chat_page.router)
    if settings.has_metrics:
        app.include_router(status.metrics_router)
    # The last that is added is the first that a request meets.
    app.add_middleware(BodyLimits, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    app.add_middleware(Authentication, api_keys=settings.api_keys, admin_api_key=settings.admin_api_key)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_methods=settings.allow_methods,
            allow_headers=settings.allow_headers,
            allow_credentials=settings.allow_credentials,
        )
    app.add_middleware(RequestIds, has_log=settings.has_request_log)
    return app
