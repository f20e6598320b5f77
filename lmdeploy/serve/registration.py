"""A server tells a proxy that it is there, again and again, and when it leaves. It knows no engine and no endpoint."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2

from lmdeploy.errors import ConfigError
from lmdeploy.logging import get_logger

_TICK_S = 0.1
_ADD_TIMEOUT_S = 10.0  # the proxy asks the server's /health before it answers
_REMOVE_TIMEOUT_S = 2.0


class Registration:
    """POST /nodes/add once the server is ready and every `interval_s` after, /nodes/remove in the end.

    A proxy that is not there yet, or that starts again, is found by the next heartbeat. While the server drains it is
    already removed, so that nothing new comes.
    """

    def __init__(
        self,
        proxy_url: str,
        node_url: str,
        models: Sequence[str],
        *,
        api_key: str | None = None,
        interval_s: float = 15.0,
    ) -> None:
        """proxy_url, node_url: `http://HOST:PORT`. Raises ConfigError for a proxy_url that is none."""
        self._proxy_url = _base_url(proxy_url)
        self._node_url = node_url
        self._body: dict[str, Any] = {"url": node_url, "status": {"models": list(models), "role": "Hybrid"}}
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._interval_s = interval_s
        self._last_word: str | None = None

    @contextmanager
    def during(
        self, is_ready: Callable[[], bool] = lambda: True, is_draining: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """A thread registers the server and keeps it registered, until the context or the server ends."""
        has_ended = threading.Event()

        def is_over() -> bool:
            return has_ended.is_set() or is_draining()

        def run() -> None:
            while not is_ready() and not is_over():
                has_ended.wait(_TICK_S)
            self._keep(is_over, has_ended)

        thread = threading.Thread(target=run, name="lmdeploy-registration", daemon=True)
        thread.start()
        try:
            yield
        finally:
            has_ended.set()
            thread.join()

    def _keep(self, is_over: Callable[[], bool], has_ended: threading.Event) -> None:
        # Verified against the system's certificates; the environment's web proxies are not asked.
        context = ssl.create_default_context()
        is_known = False
        with httpx2.Client(verify=context, trust_env=False, headers=self._headers) as client:
            while not is_over():
                is_known = self._tell(client, "/nodes/add", self._body, _ADD_TIMEOUT_S) or is_known
                waited_s = 0.0
                while waited_s < self._interval_s and not is_over():
                    has_ended.wait(_TICK_S)
                    waited_s += _TICK_S
            if is_known:
                self._tell(client, "/nodes/remove", {"url": self._node_url}, _REMOVE_TIMEOUT_S)

    def _tell(self, client: httpx2.Client, path: str, body: dict[str, Any], timeout_s: float) -> bool:
        """Whether the proxy has taken it; what it says otherwise is told once, not with every heartbeat."""
        try:
            answer = client.post(self._proxy_url + path, json=body, timeout=timeout_s)
            word = "" if answer.is_success else f"it answers {answer.status_code}: {answer.text[:300]}"
        except httpx2.HTTPError as error:
            word = str(error) or type(error).__name__
        if word != self._last_word:
            log = get_logger()
            if word:
                log.warning("the proxy %s does not take %s: %s; trying again", self._proxy_url, self._node_url, word)
            else:
                log.info("registered at the proxy %s", self._proxy_url)
        self._last_word = word
        return not word


def reachable_url(server_name: str, port: int, *, is_tls: bool, proxy_url: str) -> str:
    """Where the proxy finds a server that listens on `server_name`; for all addresses, the one that faces the proxy.

    Raises ConfigError for a proxy whose host cannot be resolved.
    """
    host = server_name
    if server_name in ("0.0.0.0", "::", ""):
        host = _own_address(proxy_url)
    return f"{'https' if is_tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def _own_address(proxy_url: str) -> str:
    """The address that this machine would use towards the proxy. A datagram socket's connect sends nothing."""
    parts = urlsplit(_base_url(proxy_url))
    try:
        family, kind, *_, address = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.connect(address)
            return str(sock.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"--proxy-url {proxy_url}: its host is not known here ({error.strerror})") from error


def _base_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ConfigError(f"--proxy-url {text!r}: give the proxy's address as http://HOST:PORT")
    return text.rstrip("/")
