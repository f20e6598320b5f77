"""An engine client without an engine: answers are scripted token by token, so that tests control every output."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from lmdeploy.engine.client import Deliver
from lmdeploy.engine.guided import GuidedVocabulary
from lmdeploy.engine.request import Request, RequestOutput
from lmdeploy.engine.validation import EngineInfo, check_request
from lmdeploy.errors import EngineDead
from lmdeploy.messages import FinishReason

Script = Callable[[Request], Iterable[int]]


@dataclass
class _Running:
    request: Request
    tokens: Iterator[int]
    deliver: Deliver
    count: int = 0


class FakeClient:
    """Gives every request one token a step, from `script`; an EngineClient. A script that ends means 'length'."""

    def __init__(
        self,
        script: Script,
        *,
        vocab_size: int = 384,
        session_len: int = 256,
        max_batch_size: int = 2,
        eos_token_ids: tuple[int, ...] = (3,),
    ) -> None:
        self.info = EngineInfo(
            architecture="FakeForCausalLM",
            dtype="float32",
            device="cpu",
            vocab_size=vocab_size,
            session_len=session_len,
            max_batch_size=max_batch_size,
            num_blocks=100,
            block_size=64,
            weight_bytes=0,
            load_s=0.0,
            eos_token_ids=list(eos_token_ids),
        )
        self.requests: list[Request] = []
        self.vocabularies: list[GuidedVocabulary] = []
        self.aborted: list[str] = []
        self.max_active = 0
        self.is_closed = False
        self._script = script
        self._error: EngineDead | None = None
        self._active: dict[str, _Running] = {}
        self._lock = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> None:
        if self._error is not None:
            raise self._error
        check_request(request, self.info)
        with self._lock:
            self.requests.append(request)
            self._active[request.request_id] = _Running(request, iter(self._script(request)), deliver)
            self.max_active = max(self.max_active, len(self._active))
            self._lock.notify()

    def load_vocabulary(self, vocabulary: GuidedVocabulary) -> None:
        self.vocabularies.append(vocabulary)

    def abort(self, request_id: str) -> None:
        with self._lock:
            self.aborted.append(request_id)
            running = self._active.pop(request_id, None)
        if running is not None:
            running.deliver(RequestOutput(request_id, finish_reason="abort"))

    def stats(self) -> dict[str, float]:
        if self._error is not None:
            raise self._error
        return {"num_running": len(self._active), "num_waiting": 0}

    def close(self) -> None:
        self.die(EngineDead("the engine is closed"))
        self.is_closed = True

    def die(self, error: EngineDead) -> None:
        """Every waiter gets the error, as when an engine fails."""
        with self._lock:
            self._error = error
            running, self._active = list(self._active.values()), {}
            self._lock.notify()
        for one in running:
            one.deliver(RequestOutput(one.request.request_id, finish_reason="error", error=error))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def wait_idle(self, timeout_s: float = 5.0) -> bool:
        """Whether no request is running any more, waiting for it."""
        deadline = time.monotonic() + timeout_s
        while self._active and time.monotonic() < deadline:
            time.sleep(0.001)
        return not self._active

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._active or self._error is not None)
                if self._error is not None:
                    return
                outputs = [(one.deliver, self._step(one)) for one in list(self._active.values())]
                for _, output in outputs:
                    if output.is_finished:
                        self._active.pop(output.request_id, None)
            for deliver, output in outputs:
                deliver(output)
            time.sleep(0.0005)  # another thread's turn

    def _step(self, running: _Running) -> RequestOutput:
        request = running.request
        sampling = request.sampling
        output = RequestOutput(request.request_id, prompt_tokens=len(request.prompt_ids))
        if sampling.prompt_logprobs and running.count == 0:
            output.prompt_logprobs = [{token: -1.0 / (1 + token)} for token in request.prompt_ids[1:]]
        if sampling.return_hidden_states == "all" and running.count == 0:
            output.hidden_states = torch.tensor(request.prompt_ids)[:, None].expand(-1, 8).float()
        token = next(running.tokens, None) if running.count < sampling.max_new_tokens else None
        if token is None:
            output.finish_reason = "length"
            return output
        running.count += 1
        output.token_ids = [token]
        if sampling.logprobs is not None:
            output.logprobs = [{token: -0.5}]
        if sampling.return_logits is not None:
            output.logits = torch.full((1, self.info.vocab_size), float(token))
        output.finish_reason = _finish_reason(running, token)
        return output


def _finish_reason(running: _Running, token: int) -> FinishReason | None:
    sampling = running.request.sampling
    if token in sampling.stop_token_ids and running.count > sampling.min_new_tokens:
        return "stop"
    return "length" if running.count >= sampling.max_new_tokens else None
