"""Applications over a scripted engine, and a folder with a tiny model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lmdeploy.async_engine import AsyncEngine
from lmdeploy.chat_template import choose_chat_template
from lmdeploy.generation import CHAT_DEFAULTS
from lmdeploy.serve.openai.app import create_app
from lmdeploy.serve.settings import ServerSettings
from lmdeploy.tokenizer import Tokenizer
from tests.fakes import FakeClient, Script
from tests.serve.driver import Served, echo
from tests.tiny_model import make_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def serve(tiny: Path) -> Iterable[Any]:
    """serve(script, settings of the server, client={settings of the scripted engine}) -> Served."""
    clients: list[FakeClient] = []

    def make(script: Script = echo, *, client: dict[str, Any] | None = None, **settings: Any) -> Served:
        clients.append(FakeClient(script, **(client or {})))
        tokenizer = Tokenizer.from_path(tiny)
        template = choose_chat_template(tiny, tokenizer, {})
        engine = AsyncEngine(tiny, clients[-1], tokenizer, template, CHAT_DEFAULTS)
        return Served(create_app(engine, ServerSettings("tiny", **settings)), engine, clients[-1])

    yield make
    for client in clients:
        client.close()
