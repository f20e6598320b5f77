"""What a handler takes from its HTTP request: the service, and who asks."""

from __future__ import annotations

from fastapi import Request

from lmdeploy.serve.service import Service


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def tenant_of(request: Request) -> str:
    """A digest of the key that the request bears; empty on a server without keys."""
    return str(request.scope.get("state", {}).get("tenant", ""))
