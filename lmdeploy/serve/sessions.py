"""Conversations that the server remembers for its clients, within bounds. It knows no HTTP and no engine.

What was said is kept as messages; its keys and values stay in the engine's prefix cache, as long as there is room.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lmdeploy.errors import InvalidParameter


@dataclass
class Conversation:
    """num_tokens: of the last turn, prompt and answer. is_busy: a turn is running."""

    said: list[dict[str, Any]] = field(default_factory=list)
    num_tokens: int = 0
    num_bytes: int = 0
    is_busy: bool = False


class Sessions:
    """The conversations of all tenants by their session_id; the least recently used are forgotten first."""

    def __init__(self, max_sessions: int = 4096, max_bytes: int = 64 << 20) -> None:
        self._max_sessions = max_sessions
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._items: OrderedDict[tuple[str, int], Conversation] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def begin(self, tenant: str, session_id: int) -> Conversation:
        """The conversation, taken until `end`. Raises InvalidParameter while it is."""
        conversation = self._items.setdefault((tenant, session_id), Conversation())
        if conversation.is_busy:
            raise InvalidParameter(f"session {session_id} has an answer in work: wait for it, or cancel it")
        conversation.is_busy = True
        return conversation

    def end(
        self, tenant: str, session_id: int, conversation: Conversation, said: list[dict[str, Any]], num_tokens: int
    ) -> None:
        """Keep a turn: the messages that are new, and the tokens so far. Without messages nothing was said."""
        if self._items.get((tenant, session_id)) is not conversation:  # forgotten meanwhile, perhaps begun anew
            return
        conversation.is_busy = False
        if said:
            conversation.said += said
            conversation.num_tokens = num_tokens
            size = len(msgspec.json.encode(said))
            conversation.num_bytes += size
            self._num_bytes += size
        self._items.move_to_end((tenant, session_id))
        self._evict()

    def forget(self, tenant: str, session_id: int) -> None:
        conversation = self._items.pop((tenant, session_id), None)
        self._num_bytes -= conversation.num_bytes if conversation is not None else 0

    def _evict(self) -> None:
        while len(self._items) > self._max_sessions or self._num_bytes > self._max_bytes:
            self.forget(*next(iter(self._items)))
