"""Chat templates built of the texts around each turn, which users can override one by one. It knows no model names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lmdeploy.chat_template.base import ChatTemplate, Message, RenderOptions
from lmdeploy.errors import ConfigError, InvalidParameter

if TYPE_CHECKING:
    from lmdeploy.tokenizer import Tokenizer

_ROLES = {"developer": "system", "function": "tool", "observation": "tool"}


@dataclass(kw_only=True)
class TurnTemplate(ChatTemplate):
    """LMDeploy's layout of a conversation:
    `{bos}{system}{meta_instruction}{eosys}{user}{u1}{eoh}{assistant}{a1}{eoa}{separator}{user}{u2}{eoh}{assistant}`.

    A system message stands in meta_instruction's place. The prompt ends with `assistant` less its trailing spaces: the first
    token of an answer brings its own. `{round}` in `user` counts the user's turns from 1. system_in_user: the system text
    stands after the first `user`. bos_each_turn: bos begins every answered turn as well. plugin, eoplugin: around the
    list of tools, as JSON.
    """

    name: str = "custom"
    bos: str = ""
    system: str = ""
    meta_instruction: str = ""
    eosys: str = ""
    user: str = ""
    eoh: str = ""
    assistant: str = ""
    eoa: str = ""
    separator: str = ""
    tool: str = ""
    eotool: str = ""
    plugin: str = ""
    eoplugin: str = ""
    system_in_user: bool = False
    bos_each_turn: bool = False
    capability: str = "chat"
    stop_words: list[str] = field(default_factory=list)

    def _render(self, messages: list[Message], options: RenderOptions) -> str:
        turns = read_turns(messages)
        opening = self._opening(turns, options.tools)
        pending = opening if self.system_in_user else ""
        out = [self.bos] if self.system_in_user else [self.bos, opening]
        rounds = 0
        for i, (role, content) in enumerate(turns):
            if role == "system":
                continue
            if role == "user":
                rounds += 1
                is_answered = i + 1 < len(turns) and turns[i + 1][0] == "assistant"
                if self.bos_each_turn and rounds > 1 and is_answered:
                    out.append(self.bos)
                out += [self.user.replace("{round}", str(rounds)), pending, content, self.eoh]
                pending = ""
            elif role == "assistant":
                out += [self.assistant, content, self.eoa, self.separator if i + 1 < len(turns) else ""]
            else:
                out += [self._tool_begin(), content, self.eotool]
        if options.add_generation_prompt:
            out.append(self.assistant.rstrip(" "))
        return "".join(out)

    def _ids(self, messages: list[Message], tokenizer: Tokenizer, options: RenderOptions) -> list[int]:
        if self.bos and self.bos not in tokenizer.special_tokens:
            # Another family's vocabulary: its own begin token instead of this spelling as text.
            own = copy(self)
            own.bos = ""
            return own._ids(messages, tokenizer, options)
        return super()._ids(messages, tokenizer, options)

    def _opening(self, turns: list[tuple[str, str]], tools: list[dict[str, Any]] | None) -> str:
        """System text and tools."""
        texts = [content for role, content in turns if role == "system"] or [self.meta_instruction]
        opening = "".join(self.system + text + self.eosys for text in texts if text)
        if not tools:
            return opening
        if not self.plugin:
            raise InvalidParameter(f"chat template {self.name!r} has no form for tools; use a model whose template has")
        functions = [tool.get("function", tool) for tool in tools]
        return opening + self.plugin + json.dumps(functions, ensure_ascii=False) + self.eoplugin

    def _tool_begin(self) -> str:
        if not self.tool:
            raise InvalidParameter(f"chat template {self.name!r} has no form for messages of a tool")
        return self.tool


def read_turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Role (system, user, assistant, tool) and text of each message; raises InvalidParameter for any other."""
    turns = []
    for message in messages:
        role = _ROLES.get(message["role"], message["role"])
        content = message["content"] or ""
        if role not in ("system", "user", "assistant", "tool"):
            raise InvalidParameter(f"role={message['role']!r}: use system, user, assistant or tool")
        if not isinstance(content, str):
            kinds = sorted({str(part.get("type")) for part in content if isinstance(part, Mapping)})
            raise InvalidParameter(
                f"content parts of type {kinds} need a vision-language model; this template takes text"
            )
        turns.append((role, content))
    return turns


@dataclass(kw_only=True)
class TokenIdTemplate(TurnTemplate):
    """A template whose turns begin with ids that need not have a spelling (Baichuan).

    Each text is encoded by itself; user_token_id or assistant_token_id stands before it and nothing after. `user` and
    `assistant` spell the two ids where only text is wanted.
    """

    user_token_id: int
    assistant_token_id: int

    def _ids(self, messages: list[Message], tokenizer: Tokenizer, options: RenderOptions) -> list[int]:
        if self.capability != "chat":
            return super()._ids(messages, tokenizer, options)
        turns = read_turns(messages)
        marks = {"user": [self.user_token_id], "assistant": [self.assistant_token_id]}
        ids = tokenizer.encode(self._opening(turns, options.tools), add_special_tokens=False)
        for role, content in turns:
            if role == "tool":
                self._tool_begin()
            if role != "system":
                ids += marks[role] + tokenizer.encode(content, add_special_tokens=False)
        opens_answer = options.add_generation_prompt and not options.continue_final_message
        return ids + (marks["assistant"] if opens_answer else [])


@dataclass(kw_only=True)
class InfillingTemplate(TurnTemplate):
    """A chat template that, with capability "infilling", fills the place marked `<FILL>` in a text (Code Llama).

    Source: Code Llama, https://arxiv.org/abs/2308.12950, prefix-suffix-middle order.
    """

    prefix_token: str
    suffix_token: str
    middle_token: str
    end_token: str

    def _render(self, messages: list[Message], options: RenderOptions) -> str:
        if self.capability != "infilling":
            return super()._render(messages, options)
        before, after = self._split(messages)
        return f"{self.bos}{self.prefix_token} {before} {self.suffix_token}{after} {self.middle_token}"

    def _split(self, messages: Sequence[Message]) -> tuple[str, str]:
        before, mark, after = "".join(content for _, content in read_turns(messages)).partition("<FILL>")
        if not mark:
            raise InvalidParameter(
                "infilling needs the mark <FILL> where text is to be written; it is not in the prompt"
            )
        return before, after

    def _ids(self, messages: list[Message], tokenizer: Tokenizer, options: RenderOptions) -> list[int]:
        if self.capability != "infilling":
            return super()._ids(messages, tokenizer, options)
        before, after = self._split(messages)
        marks = [self._mark_id(tokenizer, token) for token in (self.prefix_token, self.suffix_token, self.middle_token)]
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        head = tokenizer.encode(before, add_special_tokens=False)
        return [*begin, marks[0], *head, marks[1], *_encode_continuation(after, tokenizer), marks[2]]

    def stop_token_ids(self, tokenizer: Tokenizer) -> list[int]:
        ids = super().stop_token_ids(tokenizer)
        return [*ids, self._mark_id(tokenizer, self.end_token)] if self.capability == "infilling" else ids

    @staticmethod
    def _mark_id(tokenizer: Tokenizer, token: str) -> int:
        for spelling in ("▁" + token, token):
            token_id = tokenizer.token_to_id(spelling)
            if token_id is not None:
                return token_id
        raise ConfigError(
            f"infilling needs the token {token!r}, which this model's vocabulary lacks; use a Code Llama model"
        )


def _encode_continuation(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text that goes on in mid-line, without the space that SentencePiece puts before a text."""
    if not tokenizer.strips_first_space:
        return tokenizer.encode(text, add_special_tokens=False)
    mark = tokenizer.encode("☺", add_special_tokens=False)
    return tokenizer.encode("☺" + text, add_special_tokens=False)[len(mark) :]
