"""Outputs on their way from threads to an event loop: each arrives, in its sender's order, in few turns of the loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

from lmdeploy.engine.loop_mail import LoopMail
from lmdeploy.engine.request import RequestOutput


def test_everything_arrives_in_order_from_several_threads() -> None:
    async def main() -> list[list[int]]:
        mail = LoopMail(asyncio.get_running_loop())
        inboxes: list[asyncio.Queue[RequestOutput]] = [asyncio.Queue() for _ in range(3)]

        def send(inbox: asyncio.Queue[RequestOutput]) -> None:
            for number in range(3000):
                mail.put(inbox, RequestOutput("r", [number]))

        threads = [threading.Thread(target=send, args=(inbox,)) for inbox in inboxes]
        for thread in threads:
            thread.start()
        got = []
        for inbox in inboxes:
            got.append([(await asyncio.wait_for(inbox.get(), 20)).token_ids[0] for _ in range(3000)])
        for thread in threads:
            thread.join()
        return got

    assert asyncio.run(main()) == [list(range(3000))] * 3


def test_what_comes_together_wakes_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        mail, inbox = LoopMail(loop), asyncio.Queue[RequestOutput]()
        wakes = 0
        call_soon = loop.call_soon_threadsafe

        def count(*arguments: object) -> object:
            nonlocal wakes
            wakes += 1
            return call_soon(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "call_soon_threadsafe", count)
        for _ in range(2):
            for number in range(256):
                mail.put(inbox, RequestOutput(str(number)))
            for number in range(256):
                assert (await inbox.get()).request_id == str(number)
        return wakes

    assert asyncio.run(main()) == 2


@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_closed_loop_is_told_every_time(is_waiting: bool) -> None:
    loop = asyncio.new_event_loop()
    mail, inbox = LoopMail(loop), asyncio.Queue[RequestOutput]()
    if is_waiting:
        mail.put(inbox, RequestOutput("q"))
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            mail.put(inbox, RequestOutput("r"))
