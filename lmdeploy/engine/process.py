"""An engine in a process of its own, over one end of a socket pair: `python -m lmdeploy.engine.process FD`."""

from __future__ import annotations

import contextlib
import itertools
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from lmdeploy.engine.client import Deliver, Deliveries
from lmdeploy.engine.config import EngineConfig
from lmdeploy.engine.control import Command
from lmdeploy.engine.guided import GuidedVocabulary
from lmdeploy.engine.loop import EngineLoop
from lmdeploy.engine.request import Request, RequestOutput
from lmdeploy.engine.step_times import StepTimes
from lmdeploy.engine.validation import check_request
from lmdeploy.engine.wire import (
    Abort,
    Close,
    Connection,
    Control,
    Done,
    Failure,
    FromEngine,
    LoadVocabulary,
    Outputs,
    Ready,
    Start,
    Stats,
    Submit,
    ToEngine,
    from_failure,
    to_failure,
)  # fmt: skip
from lmdeploy.errors import EngineDead, RequestError

_STATS_INTERVAL_S = 0.5
_CLOSE_TIMEOUT_S = 10.0


class ProcessClient:
    """Talks to an engine process that it starts and ends. The EngineClient protocol."""

    def __init__(self, path: Path, config: EngineConfig) -> None:
        """Waits until the model is loaded; raises what the engine raised, or EngineDead if the process dies."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "lmdeploy.engine.process", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._connection = Connection(ours, FromEngine)
        self._deliveries = Deliveries(self.abort)
        self._error: EngineDead | None = None
        self._numbers = itertools.count()
        self._orders: dict[int, Future[None]] = {}
        try:
            ready = self._start(path, config)
        except BaseException:  # an interrupted load must not go on unseen
            self.process.kill()
            self.process.wait()
            self._connection.close()
            raise
        self.info = ready.info
        self._stats, self._stats_time = ready.stats, time.monotonic()
        self._reader = threading.Thread(target=self._read, name="lmdeploy-engine-reader", daemon=True)
        self._reader.start()

    def submit(self, request: Request, deliver: Deliver) -> None:
        if self._error is not None:
            raise self._error
        check_request(request, self.info)
        self._deliveries.register(request, deliver)
        self._send(Submit(request))

    def load_vocabulary(self, vocabulary: GuidedVocabulary) -> None:
        self._send(LoadVocabulary(vocabulary))

    def abort(self, request_id: str) -> None:
        self._send(Abort(request_id))

    def control(self, command: Command) -> None:
        number, done = next(self._numbers), Future[None]()
        self._orders[number] = done
        self._send(Control(number, command))
        if self._error is not None:
            raise self._error
        done.result()

    def stats(self) -> dict[str, float]:
        """As the process last told; the heartbeat's age grows while it is silent. Raises EngineDead."""
        if self._error is not None:
            raise self._error
        age = time.monotonic() - self._stats_time
        return {**self._stats, "heartbeat_age_s": self._stats.get("heartbeat_age_s", 0.0) + age}

    def close(self) -> None:
        self._send(Close())
        try:
            self.process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._connection.close()
        self._fail(EngineDead("the engine is closed"))

    def _start(self, path: Path, config: EngineConfig) -> Ready:
        with contextlib.suppress(OSError):  # it died at once: its exit code says more
            self._connection.send(Start(str(path), config))
        message = self._connection.receive()
        if isinstance(message, Ready):
            return message
        if isinstance(message, Failure):
            raise from_failure(message)
        code = self.process.wait()
        raise EngineDead(f"the engine process ended with code {code} before it was ready; its own output says why")

    def _send(self, message: LoadVocabulary | Submit | Abort | Control | Close) -> None:
        try:
            self._connection.send(message)
        except OSError:
            self._fail(EngineDead("the engine process is gone"))

    def _read(self) -> None:
        try:
            while (message := self._connection.receive()) is not None:
                if isinstance(message, Outputs):
                    self._deliveries.publish(message.outputs)
                elif isinstance(message, Stats):
                    self._stats, self._stats_time = message.values, time.monotonic()
                elif isinstance(message, Done):
                    self._end_order(message)
        finally:
            self._fail(EngineDead("the engine process is gone"))

    def _fail(self, error: EngineDead) -> None:
        self._error = self._error or error
        self._deliveries.fail_all(self._error)
        for number in list(self._orders):
            self._end_order(Done(number, to_failure(self._error)))

    def _end_order(self, message: Done) -> None:
        done = self._orders.pop(message.number, None)
        if done is None:
            return
        if message.failure is None:
            done.set_result(None)
        else:
            done.set_exception(from_failure(message.failure))


def serve(sock: socket.socket) -> None:
    """The engine's side: load the model that Start names, then obey until Close or until the other side is gone."""
    connection = Connection(sock, ToEngine)
    start = connection.receive()
    if not isinstance(start, Start):
        return

    def publish(outputs: list[RequestOutput]) -> None:
        try:
            _try_send(connection, Outputs(outputs))
        except RequestError as error:  # too large for a frame: each alone, and what is still too large fails alone
            if len(outputs) > 1:
                for output in outputs:
                    publish([output])
            else:
                loop.abort(outputs[0].request_id)
                publish([RequestOutput(outputs[0].request_id, finish_reason="error", error=error)])

    try:
        loop = EngineLoop(Path(start.path), start.config, publish, times := StepTimes())
    except Exception as error:
        _try_send(connection, to_failure(error))
        return
    _try_send(connection, Ready(loop.info, loop.stats()))
    stop = threading.Event()
    reporter = threading.Thread(target=_report_stats, args=(connection, loop, times, stop), daemon=True)
    reporter.start()
    while isinstance(message := connection.receive(), (LoadVocabulary, Submit, Abort, Control)):
        if isinstance(message, Submit):
            loop.add(message.request)
        elif isinstance(message, LoadVocabulary):
            loop.load_vocabulary(message.vocabulary)
        elif isinstance(message, Control):
            threading.Thread(target=_control, args=(connection, loop, message), daemon=True).start()
        else:
            loop.abort(message.request_id)
    stop.set()
    loop.close()
    connection.close()


def _control(connection: Connection, loop: EngineLoop, message: Control) -> None:
    failure = None
    try:
        loop.control(message.command)
    except Exception as error:
        failure = to_failure(error)
    _try_send(connection, Done(message.number, failure))


def _report_stats(connection: Connection, loop: EngineLoop, times: StepTimes, stop: threading.Event) -> None:
    while not stop.wait(_STATS_INTERVAL_S):
        if loop.error is not None:  # this process is of no use any more, and its end says so to the client
            connection.close()
            return
        _try_send(connection, Stats({**loop.stats(), **times.numbers()}))


def _try_send(connection: Connection, message: FromEngine) -> None:
    """Send unless the client is gone; the reading side notices that too and ends the process."""
    try:
        connection.send(message)
    except OSError:
        return


if __name__ == "__main__":
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # the client decides; a signal to the group must not end the engine first
        signal.signal(number, signal.SIG_IGN)
    serve(socket.socket(fileno=int(sys.argv[1])))
