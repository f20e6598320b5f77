"""The server's memory of conversations: one turn at a time, and never mixed up."""

from __future__ import annotations

import pytest

from lmdeploy.errors import InvalidParameter
from lmdeploy.serve.sessions import Sessions

SAID = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]


def test_a_turn_is_kept_and_the_next_has_it() -> None:
    sessions = Sessions()
    sessions.end("a", 1, sessions.begin("a", 1), SAID, 7)
    again = sessions.begin("a", 1)
    assert (again.said, again.num_tokens) == (SAID, 7)
    assert sessions.begin("b", 1).said == []


def test_one_turn_at_a_time() -> None:
    sessions = Sessions()
    sessions.begin("a", 1)
    with pytest.raises(InvalidParameter, match="has an answer in work"):
        sessions.begin("a", 1)


def test_a_turn_of_a_forgotten_conversation_does_not_touch_its_successor() -> None:
    sessions = Sessions()
    old = sessions.begin("a", 1)
    sessions.forget("a", 1)
    new = sessions.begin("a", 1)
    sessions.end("a", 1, old, SAID, 7)
    assert (new.said, new.is_busy) == ([], True)
    sessions.end("a", 1, new, SAID[:1], 3)
    assert sessions.begin("a", 1).said == SAID[:1]
