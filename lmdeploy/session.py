"""Conversations with a pipeline: what was said, turn by turn. It knows neither engine nor templates."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from lmdeploy.async_engine import Message, Prompt, check_prompt
from lmdeploy.errors import InvalidParameter
from lmdeploy.messages import GenerationConfig, Response

if TYPE_CHECKING:
    from lmdeploy.api import Pipeline


class Session:
    """A conversation with a pipeline: what was said, and the last Response.

    history: (prompt, answer) of each turn; all of it is rendered anew for the next one. gen_config: for turns without their
    own. Used as a context manager it forgets at the end.
    """

    def __init__(self, pipe: Pipeline, gen_config: GenerationConfig | None = None) -> None:
        self._pipe = pipe
        self.gen_config = gen_config
        self.history: list[tuple[Prompt, str]] = []
        self.response: Response | None = None

    def __call__(
        self, prompt: Prompt, gen_config: GenerationConfig | None = None, stream_response: bool = False
    ) -> Response | Generator[Response, None, None]:
        """The next turn: its whole Response, or the increments of it."""
        result = self._pipe.chat(prompt, self, gen_config, stream_response)
        return result.response or Response() if isinstance(result, Session) else result

    def messages(self, prompt: Prompt) -> list[Message]:
        """The conversation so far and the next prompt, a str or a list of messages."""
        messages = []
        for said, answer in self.history:
            messages += [*_as_messages(said), {"role": "assistant", "content": answer}]
        return messages + _as_messages(prompt)

    def record(self, prompt: Prompt, response: Response) -> None:
        """Keep a turn; one that failed, or was broken off before its first word, is not part of the history."""
        self.response = response
        if response.finish_reason != "error" and (response.text or response.finish_reason is not None):
            self.history.append((prompt, response.text))

    def close(self) -> None:
        """Forget the conversation."""
        self.history.clear()
        self.response = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def stream_turns(
    pipe: Pipeline,
    sessions: Session | list[Session],
    prompts: list[Prompt],
    configs: list[GenerationConfig | None],
    do_preprocess: bool,
    is_streaming: bool,
) -> Generator[Response, None, None]:
    """The next turn of each session, streamed together; each keeps its turn, or as far as it came.

    Raises InvalidParameter at once unless there is one session for each prompt, and one answer for each.
    """
    sessions = [sessions] if isinstance(sessions, Session) else sessions
    if len(sessions) != len(prompts):
        raise InvalidParameter(f"{len(sessions)} sessions for {len(prompts)} prompts: give one for each")
    if any(pipe.async_engine.effective_config(config).n != 1 for config in configs):
        raise InvalidParameter("a session takes one answer a turn: leave n at 1")
    turns = list(zip(sessions, prompts, strict=True))
    conversations = [session.messages(prompt) for session, prompt in turns]
    stream = pipe.stream_infer(conversations, None, configs, do_preprocess, stream_response=is_streaming)
    return _recorded(turns, stream)


def _recorded(
    turns: list[tuple[Session, Prompt]], stream: Generator[Response, None, None]
) -> Generator[Response, None, None]:
    parts: list[list[Response]] = [[] for _ in turns]
    with closing(stream):
        try:
            for response in stream:
                parts[response.index].append(response)
                yield response
        finally:
            for (session, prompt), pieces in zip(turns, parts, strict=True):
                if pieces:
                    session.record(prompt, _merge(pieces))


def _as_messages(prompt: Prompt) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    check_prompt(prompt)
    if isinstance(prompt[0], int):
        raise InvalidParameter("a conversation takes text or messages, not token ids")
    return list(prompt)  # type: ignore[arg-type]


def _merge(pieces: list[Response]) -> Response:
    """The whole answer of its increments."""
    logprobs = [part for piece in pieces for part in piece.logprobs or []]
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        logprobs=logprobs or None,
    )
