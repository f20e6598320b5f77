"""The class interface of LMDeploy 0.1: `TurboMind`, its instances, and conversations kept by session id.

It speaks token ids to the engine and leaves text to the caller, as that version did.
"""

from __future__ import annotations

import os
import queue
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmdeploy.async_engine import AsyncEngine, open_engine
from lmdeploy.chat_template import ChatTemplate
from lmdeploy.chat_template.config import ChatTemplateConfig
from lmdeploy.engine.config import TRANSLATED, EngineConfig
from lmdeploy.engine.request import Request, RequestOutput, SamplingParams
from lmdeploy.errors import InvalidParameter
from lmdeploy.old_arguments import merge_old_kwargs
from lmdeploy.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

# Arguments of from_pretrained that have no meaning for this engine.
_WITHOUT_EFFECT = ("group_size", "instance_num", "eos_id")


class TurboMind:
    """A loaded model, whose instances generate from token ids.

    model: what 0.1 called so, the chat template with its get_prompt(text, sequence_start=True).
    """

    def __init__(
        self,
        model_path: AsyncEngine | str | os.PathLike[str] | None = None,
        model_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As from_pretrained. model_path: also an engine that runs already."""
        engine = model_path if isinstance(model_path, AsyncEngine) else _open(model_path, model_name, kwargs)
        self.engine = engine
        self.tokenizer: Tokenizer = engine.tokenizer
        self.model: ChatTemplate = engine.chat_template
        self.histories: dict[int, list[int]] = {}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | None = None, model_name: str | None = None, **kwargs: Any
    ) -> TurboMind:
        """Load a model or a workspace. model_name: its chat template's name, None for the model's own, or the workspace's;
        kwargs: engine settings such as session_len, tp, cache_max_entry_count. Raises ConfigError, ModelNotSupported,
        CheckpointError.
        """
        return cls(pretrained_model_name_or_path, model_name, **kwargs)

    def create_instance(self) -> TurboMindInstance:
        """What generates; instances share the engine and the sessions."""
        return TurboMindInstance(self)

    def close(self) -> None:
        """Free the engine's memory."""
        self.engine.close()

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be shutting down
            self.close()


def _open(model_path: str | os.PathLike[str] | None, model_name: str | None, kwargs: dict[str, Any]) -> AsyncEngine:
    settings = {name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT}
    config = merge_old_kwargs(None, settings)
    given = frozenset(TRANSLATED[name] for name in settings if name in TRANSLATED)
    return open_engine(
        None if model_path is None else os.fspath(model_path),
        # With prefix caching a session's history is read back.
        EngineConfig.from_public(config, given=given, enable_prefix_caching=True),
        chat_template_config=None if model_name is None else ChatTemplateConfig(model_name=model_name),
        revision=config.revision,
        download_dir=config.download_dir,
    )


@dataclass
class _Sequence:
    """One running item of a batch."""

    session_id: int
    request: Request
    output_ids: list[int] = field(default_factory=list)
    is_finished: bool = False

    def visible_ids(self) -> list[int]:
        """The output without the token that ended it."""
        ids = self.output_ids
        is_stopped = self.is_finished and ids and ids[-1] in self.request.sampling.stop_token_ids
        return ids[:-1] if is_stopped else ids


class TurboMindInstance:
    """Generates for sessions.

    A session's tokens so far are kept from sequence_start to sequence_end, without the end tokens of its answers: those
    are the first thing that get_prompt of a later turn gives.
    """

    def __init__(self, tm_model: TurboMind) -> None:
        self._model = tm_model  # keeps the engine open
        self._histories = tm_model.histories
        self._engine = tm_model.engine
        self._running: dict[int, str] = {}

    def stream_infer(
        self,
        session_id: int | Sequence[int],
        input_ids: Sequence[int] | Sequence[Sequence[int]],
        request_output_len: int = 512,
        sequence_start: bool = True,
        sequence_end: bool = False,
        step: int = 0,
        stop: bool = False,
        top_p: float = 0.8,
        top_k: int = 40,
        temperature: float = 0.8,
        repetition_penalty: float = 1.0,
        ignore_eos: bool = False,
        random_seed: int | None = None,
        stream_output: bool = False,
    ) -> Iterator[list[tuple[Tensor, int]]]:
        """Yields, for each item of the batch, all its output ids so far ([n] int64) and their count.

        session_id: one for each item of input_ids. sequence_start=False continues the sessions, from token `step` of them
        if that is not 0. sequence_end forgets them afterwards; stop ends what runs in them, and nothing is generated.
        stream_output=False yields once, at the end. Raises RequestError and EngineDead.
        """
        session_ids, batch = _sessions(session_id), _items(input_ids)
        if stop:
            for session in session_ids:
                self.cancel(session)
            return
        if len(set(session_ids)) != len(batch):
            raise InvalidParameter(f"session_id={session_id!r} for {len(batch)} input_ids: give each its own")
        sampling = SamplingParams(
            max_new_tokens=request_output_len,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=random_seed,
            stop_token_ids=() if ignore_eos else tuple(self._engine.end_token_ids),
        )
        sequences = []
        for session, ids in zip(session_ids, batch, strict=True):
            history = [] if sequence_start else self._histories.get(session, [])[: step or None]
            sequences.append(_Sequence(session, Request(uuid.uuid4().hex, history + ids, sampling)))
        try:
            yield from self._run(sequences, stream_output)
        finally:
            for sequence in sequences:
                self._finish(sequence, sequence_end)

    def cancel(self, session_id: int) -> None:
        """End what runs in the session; its tokens so far are kept."""
        if request_id := self._running.get(session_id):
            self._engine.client.abort(request_id)

    def end(self, session_id: int) -> None:
        """Forget the session."""
        self.cancel(session_id)
        self._histories.pop(session_id, None)

    def _run(self, sequences: list[_Sequence], is_streaming: bool) -> Iterator[list[tuple[Tensor, int]]]:
        import torch

        inbox: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        for sequence in sequences:
            self._engine.client.submit(sequence.request, inbox.put)
            self._running[sequence.session_id] = sequence.request.request_id
        by_id = {sequence.request.request_id: sequence for sequence in sequences}
        while not all(sequence.is_finished for sequence in sequences):
            output = inbox.get()
            if output.error is not None:
                raise output.error
            sequence = by_id[output.request_id]
            sequence.output_ids += output.token_ids
            sequence.is_finished = output.is_finished
            if is_streaming or all(sequence.is_finished for sequence in sequences):
                shown = [sequence.visible_ids() for sequence in sequences]
                yield [(torch.tensor(ids, dtype=torch.int64), len(ids)) for ids in shown]

    def _finish(self, sequence: _Sequence, is_end: bool) -> None:
        if not sequence.is_finished:
            self._engine.client.abort(sequence.request.request_id)
        if self._running.get(sequence.session_id) == sequence.request.request_id:
            del self._running[sequence.session_id]
        if is_end:
            self._histories.pop(sequence.session_id, None)
        elif sequence.is_finished or sequence.output_ids:  # a refused turn leaves the session as it was
            self._histories[sequence.session_id] = sequence.request.prompt_ids + sequence.visible_ids()


def _sessions(session_id: int | Sequence[int]) -> list[int]:
    return [session_id] if isinstance(session_id, int) else list(session_id)


def _items(input_ids: Any) -> list[list[int]]:
    """The batch as lists, from one list of ids or several, or arrays of them."""
    rows = input_ids.tolist() if hasattr(input_ids, "tolist") else list(input_ids)
    if rows and isinstance(rows[0], int):
        return [rows]
    return [row.tolist() if hasattr(row, "tolist") else list(row) for row in rows]
