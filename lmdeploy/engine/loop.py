"""The thread that drives an engine: takes commands between steps, publishes what each step brought."""

from __future__ import annotations

import atexit
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.core import Engine
from lmdeploy.engine.request import Request, RequestOutput
from lmdeploy.engine.validation import EngineInfo
from lmdeploy.errors import EngineDead, InvalidGrammar, LMDeployError
from lmdeploy.logging import get_logger

if TYPE_CHECKING:
    from lmdeploy.engine.control import Command, Order
    from lmdeploy.engine.guided import GrammarThreads, GuidedVocabulary, Matcher
    from lmdeploy.engine.step_times import StepTimes

Publish = Callable[[list[RequestOutput]], None]


@dataclass(frozen=True)
class _Add:
    request: Request
    matcher: Matcher | None = None


_Command: TypeAlias = "_Add | str | Order | None"  # add, abort by id, a command to the whole engine, close


class EngineLoop:
    """Owns an engine and its thread. `publish` is called from that thread with every step's news."""

    def __init__(self, path: Path, config: EngineConfig, publish: Publish, times: StepTimes | None = None) -> None:
        """Loads the model in the caller's thread, where it can be interrupted. times: of its steps."""
        started = time.monotonic()
        engine = Engine(path, config, starts_runner=False)
        self.error: EngineDead | None = None
        self.heartbeat = time.monotonic()
        self._stats: dict[str, float] = {}
        engine.times = times
        self._publish = publish
        self._live: set[str] = set()
        self._grammars: GrammarThreads | None = None
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(engine, ready), name="lmdeploy-engine", daemon=True)
        try:
            # A thread that came back from a kernel after the interpreter's end would abort it.
            atexit.register(self.close)
            self._thread.start()
            ready.result()
        except BaseException:
            self._commands.put(None)  # interrupted, the thread is still there
            del ready  # or its error, whose traceback leads here, would keep the model until the next collection
            raise
        self.info: EngineInfo = replace(engine.info, load_s=time.monotonic() - started)

    def add(self, request: Request) -> None:
        """Queue a request; if the engine refuses it, or is dead, that is published as its output."""
        if request.sampling.grammar is None:
            self._put(request)
        elif self._grammars is not None:
            self._grammars.start(request)
        else:
            self._refuse(request.request_id, InvalidGrammar("the engine has not been told the vocabulary yet"))

    def abort(self, request_id: str) -> None:
        if self._grammars is None or not self._grammars.abort(request_id):
            self._commands.put(request_id)

    def load_vocabulary(self, vocabulary: GuidedVocabulary) -> None:
        """What requests with a grammar need; to be told once, before the first of them."""
        from lmdeploy.engine.guided import GrammarCompiler, GrammarThreads

        compiler = GrammarCompiler(vocabulary, self.info.vocab_size)
        self._grammars = self._grammars or GrammarThreads(compiler, self._put, self._refuse)

    def control(self, command: Command) -> None:
        """Obey a command to the engine as a whole; returns once it has. Raises what that raised, or EngineDead."""
        from lmdeploy.engine.control import Order

        self.check_alive()
        order = Order(command)
        self._commands.put(order)
        if self.error is not None:
            order.fail(self.error)
        order.done.result()

    def check_alive(self) -> None:
        """Raise EngineDead if no request can be answered any more."""
        if self.error is None and not self._thread.is_alive():
            self.error = EngineDead("this process was forked and has no engine: load the model after the fork")
        if self.error is not None:
            raise self.error

    def stats(self) -> dict[str, float]:
        """The counters after the last step, and the age of the last sign of life of a loop that has work."""
        return {**self._stats, "heartbeat_age_s": max(time.monotonic() - self.heartbeat, 0.0)}

    def close(self) -> None:
        """End all requests, stop the thread, free the engine's memory."""
        atexit.unregister(self.close)
        if self._grammars is not None:
            self._grammars.close()
        self._commands.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _put(self, request: Request, matcher: Matcher | None = None) -> None:
        self._commands.put(_Add(request, matcher))
        if self.error is not None:
            self._refuse(request.request_id, self.error)

    def _refuse(self, request_id: str, error: Exception | None) -> None:
        """End a request that never reached the engine; without an error it was aborted."""
        self._publish([RequestOutput(request_id, finish_reason="abort" if error is None else "error", error=error)])

    def _run(self, engine: Engine, ready: Future[None]) -> None:
        error = EngineDead("the engine is closed")
        try:
            engine.start_runner()
            self._stats = engine.stats()
            ready.set_result(None)
            while self._drain(engine):
                if engine.has_work:
                    self._deliver(engine.step())
            self._deliver(engine.close())
        except BaseException as cause:  # whatever ends this thread, its waiters must hear of it
            if ready.done():
                get_logger().exception("the engine has stopped")
            else:
                ready.set_exception(cause)
                del ready  # as above
            error = EngineDead(f"the engine has stopped: {type(cause).__name__}: {cause}")
        self._end(error)

    def _drain(self, engine: Engine) -> bool:
        """Obey the queued commands, waiting for one if there is nothing else to do; False to stop."""
        while True:
            has_work = engine.has_work
            self._stats = engine.stats()
            self.heartbeat = time.monotonic() if has_work else math.inf  # an idle loop may wait as long as it likes
            try:
                command = self._commands.get(timeout=0.0 if has_work or engine.prepare_more() else None)
            except queue.Empty:
                if has_work:
                    return True
                continue
            if command is None:
                return False
            self._deliver(self._obey(engine, command))

    def _obey(self, engine: Engine, command: _Add | str | Order) -> list[RequestOutput]:
        if isinstance(command, str):
            output = engine.abort(command)
            return [] if output is None else [output]
        if not isinstance(command, _Add):
            self.heartbeat = math.inf  # reading weights may take as long as it likes
            return command.run(engine)
        request = command.request
        self._live.add(request.request_id)
        try:
            engine.add(request, command.matcher)
        except LMDeployError as error:
            return [RequestOutput(request.request_id, finish_reason="error", error=error)]
        return []

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        if outputs:
            self._live.difference_update([output.request_id for output in outputs if output.finish_reason is not None])
            self._publish(outputs)

    def _end(self, error: EngineDead) -> None:
        """Tell every waiter, those still in the queue of commands too; `add` itself tells those that come later."""
        self.error = error
        atexit.unregister(self.close)
        self._stats = {**self._stats, "num_running": 0, "num_waiting": 0}
        while not self._commands.empty():
            command = self._commands.get()
            if isinstance(command, _Add):
                self._live.add(command.request.request_id)
            elif command is not None and not isinstance(command, str):
                command.fail(error)
        self._deliver([RequestOutput(live, finish_reason="error", error=error) for live in sorted(self._live)])
