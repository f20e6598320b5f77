"""The application: endpoints, what every request passes before them, the pages that document them."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from lmdeploy.async_engine import AsyncEngine
from lmdeploy.serve import errors
from lmdeploy.serve.middleware import Authentication, BodyLimits
from lmdeploy.serve.openai import chat, completions, embeddings, native, status
from lmdeploy.serve.service import Service
from lmdeploy.serve.settings import ServerSettings
from lmdeploy.version import __version__

_ROUTERS = (chat.router, completions.router, embeddings.router, native.router, status.router)


def create_app(engine: AsyncEngine, settings: ServerSettings) -> FastAPI:
    """An ASGI application over a started engine, which stays the caller's to close. `app.state.service` is its Service."""
    about = {"title": "LMDeploy", "version": __version__}
    if settings.has_docs:
        app = FastAPIOffline(docs_url="/", redoc_url="/redoc", **about)
    else:
        app = FastAPI(openapi_url=None, **about)
    app.state.service = Service(engine, settings)
    errors.install(app)
    for router in _ROUTERS:
        app.include_router(router)
    if settings.has_metrics:
        app.include_router(status.metrics_router)
    # The last that is added is the first that a request meets.
    app.add_middleware(BodyLimits, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    app.add_middleware(Authentication, api_keys=settings.api_keys)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_methods=settings.allow_methods,
            allow_headers=settings.allow_headers,
            allow_credentials=settings.allow_credentials,
        )
    return app
