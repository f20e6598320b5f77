"""Stands in for AsyncEngine: answers are scripted, prompts are recorded, a token is a character."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from lmdeploy.generation import CHAT_DEFAULTS, effective_config
from lmdeploy.messages import GenerationConfig, Response


class FakeEngine:
    """`answers`: one text a prompt; '\\x03' in it is a Ctrl-C at that place; an Exception is what the engine refuses with."""

    def __init__(self, answers: Sequence[str | Exception] = (), session_len: int = 1000) -> None:
        self.answers = list(answers)
        self.prompts: list[Any] = []
        self.configs: list[GenerationConfig | None] = []
        self.num_closed_early = 0
        self.chat_template = SimpleNamespace(name="fake", capability="chat")
        self.client = SimpleNamespace(info=SimpleNamespace(session_len=session_len))

    def effective_config(self, config: GenerationConfig | None = None) -> GenerationConfig:
        return effective_config(config, CHAT_DEFAULTS)

    def encode(self, prompt: Any) -> list[int]:
        text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
        return [ord(char) for char in text]

    def stream(self, prompts: Sequence[tuple[Any, GenerationConfig | None]]) -> Iterator[Response]:
        (prompt, config), *_ = prompts
        self.prompts.append(prompt)
        self.configs.append(config)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            yield Response(finish_reason="error", error_code=400, error_message=str(answer))
            return
        num_prompt = len(self.encode(prompt))
        room = self.client.info.session_len - num_prompt
        is_done = False
        try:
            for number, char in enumerate(answer[:room], 1):
                if char == "\x03":
                    raise KeyboardInterrupt
                is_last = number == min(len(answer), room)
                reason = ("length" if len(answer) > room else "stop") if is_last else None
                is_done = is_last
                yield Response(char, number, num_prompt, reason, [ord(char)], cached_tokens=num_prompt // 2)
        finally:
            self.num_closed_early += not is_done
