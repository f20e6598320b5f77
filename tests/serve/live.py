"""A server on the loopback interface with its engine in a process of its own, as the command starts it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmdeploy.async_engine import open_engine
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.process import ProcessClient
from lmdeploy.generation import CHAT_DEFAULTS
from lmdeploy.serve.openai.app import create_app
from lmdeploy.serve.server import Server, bind
from lmdeploy.serve.service import Service
from lmdeploy.serve.settings import ServerSettings

KEY = "a key"
CONFIG = EngineConfig(
    dtype="float32",
    device="cpu",
    block_size=16,
    cache_max_entry_count=128,
    max_batch_size=4,
    enable_prefix_caching=True,
)


@contextmanager
def running(model: Path, **settings: Any) -> Iterator[tuple[str, Service]]:
    """The address of a server in this process, with its engine in another, and its Service."""
    engine = open_engine(str(model), CONFIG, defaults=CHAT_DEFAULTS, start=ProcessClient)
    app = create_app(engine, ServerSettings("tiny", api_keys=(KEY,), max_concurrent_requests=8, **settings))
    server = Server(app, drain_timeout_s=5.0)
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    thread = threading.Thread(target=server.run_on, args=(sock,))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}", app.state.service
    finally:
        app.state.service.is_draining = True
        thread.join()
        engine.close()
