"""Answers of /v1/responses that can be continued, in memory and within bounds. It knows no HTTP and no engine."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec


@dataclass(frozen=True)
class StoredResponse:
    """body: as the client got it. said: the conversation up to and with this answer, instructions aside."""

    body: dict[str, Any]
    said: list[dict[str, Any]]
    num_bytes: int


class ResponseStore:
    """Keeps the latest responses of each tenant's; the least recently used go first, whoever's they are."""

    def __init__(self, max_responses: int = 1024, max_bytes: int = 64 << 20) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._items: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, tenant: str, body: dict[str, Any], said: list[dict[str, Any]]) -> None:
        """Keep a response, unless it alone is larger than all that may be kept."""
        item = StoredResponse(body, said, len(msgspec.json.encode([body, said])))
        self._items[tenant, body["id"]] = item
        self._num_bytes += item.num_bytes
        while len(self._items) > self._max_responses or self._num_bytes > self._max_bytes:
            _, evicted = self._items.popitem(last=False)
            self._num_bytes -= evicted.num_bytes

    def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        """A tenant's response; nobody sees another's."""
        item = self._items.get((tenant, response_id))
        if item is not None:
            self._items.move_to_end((tenant, response_id))
        return item

    def delete(self, tenant: str, response_id: str) -> bool:
        """Whether there was such a response."""
        item = self._items.pop((tenant, response_id), None)
        self._num_bytes -= item.num_bytes if item is not None else 0
        return item is not None
