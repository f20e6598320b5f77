"""How everything above the engine talks to it: one protocol, an engine in this process or in its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.loop import EngineLoop
from lmdeploy.engine.request import Request, RequestOutput
from lmdeploy.engine.validation import EngineInfo, check_request
from lmdeploy.errors import EngineDead, InvalidParameter
from lmdeploy.logging import get_logger

if TYPE_CHECKING:
    from lmdeploy.engine.control import Command
    from lmdeploy.engine.guided import GuidedVocabulary

Deliver = Callable[[RequestOutput], None]


class EngineClient(Protocol):
    """Thread safe. `deliver` is called from the engine's thread and must be quick."""

    info: EngineInfo

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Start a request. Raises PromptTooLong, InvalidParameter or EngineDead at once."""

    def load_vocabulary(self, vocabulary: GuidedVocabulary) -> None:
        """Tell the engine the tokens' bytes, before the first request with a grammar."""

    def abort(self, request_id: str) -> None:
        """End a request; its last output says 'abort', unless it had ended already."""

    def stats(self) -> dict[str, float]:
        """num_running, num_waiting, num_blocks, num_free_blocks, num_preemptions, heartbeat_age_s. May raise EngineDead."""

    def control(self, command: Command) -> None:
        """Obey a command to the engine as a whole; returns once it has. Raises ConfigError, CheckpointError or EngineDead."""

    def close(self) -> None:
        """Abort what runs and free the engine's memory. May be called again."""


class Deliveries:
    """Which callback waits for which request."""

    def __init__(self, abort: Callable[[str], None]) -> None:
        self._abort = abort
        self._of_request: dict[str, Deliver] = {}
        self._lock = threading.Lock()

    def register(self, request: Request, deliver: Deliver) -> None:
        with self._lock:
            if request.request_id in self._of_request:
                raise InvalidParameter(f"request id {request.request_id!r} is in use: give each request its own")
            self._of_request[request.request_id] = deliver

    def publish(self, outputs: list[RequestOutput]) -> None:
        """Hand each output to its waiter. A waiter that fails loses its own request and nothing else."""
        with self._lock:
            receivers = [self._of_request.get(output.request_id) for output in outputs]
            for output in outputs:
                if output.finish_reason is not None:
                    self._of_request.pop(output.request_id, None)
        for output, deliver in zip(outputs, receivers, strict=True):
            try:
                if deliver is not None:
                    deliver(output)
            except BaseException:
                get_logger().exception("the receiver of request %s failed; it is aborted", output.request_id)
                self._abort(output.request_id)

    def fail_all(self, error: EngineDead) -> None:
        """The engine is gone: the last output of every request still waited for."""
        with self._lock:
            ids = list(self._of_request)
        self.publish([RequestOutput(request_id, finish_reason="error", error=error) for request_id in ids])


class ThreadClient:
    """An engine on a thread of this process."""

    def __init__(self, path: Path, config: EngineConfig) -> None:
        self._deliveries = Deliveries(self.abort)
        self._loop = EngineLoop(path, config, self._deliveries.publish)
        self.info = self._loop.info

    def submit(self, request: Request, deliver: Deliver) -> None:
        self._loop.check_alive()
        check_request(request, self.info)
        self._deliveries.register(request, deliver)
        self._loop.add(request)

    def load_vocabulary(self, vocabulary: GuidedVocabulary) -> None:
        self._loop.load_vocabulary(vocabulary)

    def abort(self, request_id: str) -> None:
        self._loop.abort(request_id)

    def stats(self) -> dict[str, float]:
        return self._loop.stats()

    def control(self, command: Command) -> None:
        self._loop.control(command)

    def close(self) -> None:
        self._loop.close()
        self._deliveries.fail_all(self._loop.error or EngineDead("the engine is closed"))
