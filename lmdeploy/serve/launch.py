"""`lmdeploy.serve(...)` and `lmdeploy.client(...)`: a server in a process of its own, and a client of one.

It knows the command line of the server, and nothing of what the server does.
"""

from __future__ import annotations

import atexit
import json
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from lmdeploy.chat_template.config import ChatTemplateConfig
from lmdeploy.errors import ConfigError
from lmdeploy.messages import PublicConfig, TurbomindEngineConfig, non_default_fields
from lmdeploy.pytorch_config import PytorchEngineConfig
from lmdeploy.serve.openai.api_client import APIClient

_READY = re.compile(r"^serving .* at (https?://\S+); Ctrl-C ends it$")
_LAST_LINES = 20
_END_TIMEOUT_S = 15.0
# Fields of the config classes whose flag is not their own name.
_FLAGS = {"block_size": "--cache-block-seq-len", "async_": "--async", "device_type": "--device"}


class ServedModel(APIClient):
    """A client of a server that this process has started; closing it ends the server."""

    def __init__(self, process: subprocess.Popen[str], url: str, api_key: str | None) -> None:
        super().__init__(url, api_key)
        self.process = process
        atexit.register(self.close)

    def close(self) -> None:
        """Let running answers end, then end the server, and free its memory. May be called again."""
        atexit.unregister(self.close)
        super().close()
        _end(self.process)


def client(api_server_url: str = "http://127.0.0.1:23333", api_key: str | None = None) -> APIClient:
    """A client of a running server."""
    return APIClient(api_server_url, api_key)


def serve(
    model_path: str | None = None,
    model_name: str | None = None,
    backend: Literal["turbomind", "pytorch"] = "turbomind",
    backend_config: PublicConfig | None = None,
    chat_template_config: ChatTemplateConfig | None = None,
    server_name: str = "127.0.0.1",
    server_port: int = 23333,
    log_level: str = "ERROR",
    api_keys: str | Sequence[str] | None = None,
    **kwargs: Any,
) -> ServedModel:
    """Start `lmdeploy serve api_server` and wait until it answers; what it prints goes to stderr.

    model_name: what clients call the model. server_port: 0 takes a free one. api_keys: of which the first is the returned
    client's. kwargs: engine settings as old versions took them here, such as tp or session_len. The server ends with the
    client's close, with its `with` block, and with this process. Raises ConfigError with the server's last words if it
    does not start.
    """
    config = backend_config or (PytorchEngineConfig() if backend == "pytorch" else TurbomindEngineConfig())
    if kwargs:
        from lmdeploy.old_arguments import merge_old_kwargs

        config = merge_old_kwargs(config, kwargs)
    keys = [api_keys] if isinstance(api_keys, str) else list(api_keys or ())
    command = [sys.executable, "-m", "lmdeploy", "serve", "api_server", *([model_path] if model_path else [])]
    command += ["--server-name", server_name, "--server-port", str(server_port), "--log-level", log_level]
    command += ["--model-name", model_name] if model_name else []
    command += [*engine_arguments(config), *(["--api-keys", *keys] if keys else [])]
    with TemporaryDirectory() as folder:
        if chat_template_config is not None:
            path = Path(folder) / "chat_template.json"
            chat_template_config.to_json(str(path))
            command += ["--chat-template", str(path)]
        process, url = _start(command)
    return ServedModel(process, url.replace("://0.0.0.0", "://127.0.0.1"), keys[0] if keys else None)


def engine_arguments(config: PublicConfig) -> list[str]:
    """The flags of a config: one for each field that is not at its default."""
    backend = "pytorch" if isinstance(config, PytorchEngineConfig) else "turbomind"
    return ["--backend", backend, *_field_arguments(non_default_fields(config))]


def _field_arguments(values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
        if isinstance(value, bool):
            yield flag if value else f"--no-{flag[2:]}"
        elif name == "adapters":
            yield from (flag, *(f"{key}={path}" for key, path in value.items()))
        else:
            yield from (flag, json.dumps(value) if isinstance(value, dict) else str(value))


def _start(command: Sequence[str]) -> tuple[subprocess.Popen[str], str]:
    """The server's process and its address, once it has told it."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    last: deque[str] = deque(maxlen=_LAST_LINES)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            last.append(line.rstrip("\n"))
            print(line, end="", file=sys.stderr, flush=True)
            if found := _READY.match(line.rstrip("\n")):
                threading.Thread(target=_forward, args=(process.stderr,), daemon=True).start()
                return process, found[1]
    except BaseException:  # an interrupt while it loads must not leave it behind
        process.kill()
        process.wait()
        raise
    words = "; ".join(line for line in last if line.startswith("error:")) or "\n".join(last)
    raise ConfigError(f"the server did not start (exit status {process.wait()}): {words.removeprefix('error: ')}")


def _forward(lines: Iterator[str]) -> None:
    for line in lines:
        print(line, end="", file=sys.stderr, flush=True)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
