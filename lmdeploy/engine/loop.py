"""The thread that drives an engine: takes commands between steps, publishes what each step brought."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.engine.request import Request, RequestOutput
from lmdeploy.engine.validation import EngineInfo
from lmdeploy.errors import EngineDead, LMDeployError
from lmdeploy.logging import get_logger

Publish = Callable[[list[RequestOutput]], None]
_Command = Callable[[Engine], list[RequestOutput]]


class EngineLoop:
    """Owns an engine and its thread. `publish` is called from that thread with every step's news."""

    def __init__(self, path: Path, config: EngineConfig, publish: Publish) -> None:
        """Loads the model in the caller's thread, so that its errors are the caller's."""
        self._engine: Engine | None = Engine(path, config)
        self.info: EngineInfo = self._engine.info
        self.error: EngineDead | None = None
        self.heartbeat = time.monotonic()
        self._stats = self._engine.stats()
        self._publish = publish
        self._live: set[str] = set()
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="lmdeploy-engine", daemon=True)
        self._thread.start()

    def add(self, request: Request) -> None:
        """Queue a request; if the engine refuses it, or is dead, that is published as its output."""

        def command(engine: Engine) -> list[RequestOutput]:
            try:
                engine.add(request)
            except LMDeployError as error:
                return [RequestOutput(request.request_id, finish_reason="error", error=error)]
            self._live.add(request.request_id)
            return []

        self._commands.put(command)
        if self.error is not None:
            self._publish([RequestOutput(request.request_id, finish_reason="error", error=self.error)])

    def abort(self, request_id: str) -> None:
        def command(engine: Engine) -> list[RequestOutput]:
            output = engine.abort(request_id)
            return [] if output is None else [output]

        self._commands.put(command)

    def stats(self) -> dict[str, float]:
        """The counters after the last step, and the age of the last sign of life of a loop that has work."""
        return {**self._stats, "heartbeat_age_s": time.monotonic() - self.heartbeat}

    def close(self) -> None:
        """End all requests, stop the thread, free the engine's memory."""
        self._commands.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        engine, self._engine = self._engine, None
        assert engine is not None
        try:
            while self._drain(engine):
                if engine.has_work:
                    self._deliver(engine.step())
                self.heartbeat = time.monotonic()
                self._stats = engine.stats()
            self._deliver(engine.close())
        except Exception as error:
            get_logger().exception("the engine has stopped")
            self._die(f"the engine has stopped: {type(error).__name__}: {error}")
        else:
            self.error = EngineDead("the engine is closed")
        self._stats = {**self._stats, "num_running": 0, "num_waiting": 0}

    def _drain(self, engine: Engine) -> bool:
        """Run the queued commands, waiting for one if there is nothing else to do; False to stop."""
        while True:
            try:
                command = self._commands.get(timeout=None if not engine.has_work else 0.0)
            except queue.Empty:
                return True
            if command is None:
                return False
            self._deliver(command(engine))

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        if outputs:
            self._live.difference_update(output.request_id for output in outputs if output.is_finished)
            self._publish(outputs)

    def _die(self, message: str) -> None:
        """Tell every waiter, those still in the queue of commands too."""
        self.error = EngineDead(message)
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                break
            if command is not None:
                self._deliver(command(_DeadEngine()))  # type: ignore[arg-type]
        self._deliver([RequestOutput(live, finish_reason="error", error=self.error) for live in sorted(self._live)])


class _DeadEngine:
    """Stands in for the engine when queued commands are answered after its death."""

    def add(self, request: Request) -> None:
        raise EngineDead("the engine has stopped")

    def abort(self, request_id: str) -> None:
        return None
