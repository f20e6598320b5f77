"""Which node gave which answer of /v1/responses, as only that node can go on from it. It knows the id's form, no more."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence

from lmdeploy.serve.proxy.node import Node

_ID = re.compile(rb'"id"\s*:\s*"(resp_[A-Za-z0-9_-]{1,128})"')
_MAX_ANSWERS = 1 << 16
_HEAD_BYTES = 4096


class ResponseHomes:
    """Remembers the last 65,536 answers."""

    def __init__(self) -> None:
        self._homes: OrderedDict[str, str] = OrderedDict()

    def learn(self, node: Node, head: bytes) -> None:
        """The node's answer begins like this, in whole or as the first event of a stream."""
        if found := _ID.search(head[:_HEAD_BYTES]):
            self._homes[found[1].decode()] = node.url
            if len(self._homes) > _MAX_ANSWERS:
                self._homes.popitem(last=False)

    def find(self, response_id: str | None, nodes: Sequence[Node]) -> Node | None:
        """The one of the nodes that gave the answer."""
        home = self._homes.get(response_id) if response_id is not None else None
        return next((node for node in nodes if node.url == home), None)
