"""From the thread that delivers outputs to the tasks of an event loop. It knows no engine."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TypeAlias

from lmdeploy.engine.request import RequestOutput

Inbox: TypeAlias = "asyncio.Queue[RequestOutput]"


class LoopMail:
    """Wakes the loop once for all outputs that have come meanwhile: a step brings one for each request, and a call of
    call_soon_threadsafe takes longer than everything else that is done for a token."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: deque[tuple[Inbox, RequestOutput]] = deque()
        self._is_due = False

    def put(self, inbox: Inbox, output: RequestOutput) -> None:
        """From any thread. Raises RuntimeError if the loop is closed."""
        self._waiting.append((inbox, output))
        if not self._is_due or self.loop.is_closed():  # a closed loop never takes the turn that is due
            self._is_due = True
            try:
                self.loop.call_soon_threadsafe(self._hand_out)
            except RuntimeError:
                self._is_due = False
                self._waiting.clear()
                raise

    def _hand_out(self) -> None:
        self._is_due = False  # before looking: whatever comes later asks for another turn
        while self._waiting:
            inbox, output = self._waiting.popleft()
            inbox.put_nowait(output)


def loop_mail(last: LoopMail | None) -> LoopMail:
    """The running event loop's: the last one used if it is that, since most engines serve one loop."""
    loop = asyncio.get_running_loop()
    return last if last is not None and last.loop is loop else LoopMail(loop)
