"""Stop strings in a stream: the same result as searching the whole text, however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.errors import InvalidParameter
from lmdeploy.stop_strings import StopChecker


def search_whole_text(text: str, words: list[str], include: bool) -> tuple[str, bool]:
    """Feed one character after the other to the definition."""
    for end in range(1, len(text) + 1):
        matching = [word for word in words if text[:end].endswith(word)]
        if matching:
            longest = max(map(len, matching))
            return text[: end if include else end - longest], True
    return text, False


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("ab<", max_size=30),
    words=st.lists(st.text("ab<", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
    data=st.data(),
)
def test_equals_a_search_of_the_whole_text(text: str, words: list[str], include: bool, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    checker = StopChecker(words, include)
    emitted, stopped = "", False
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece, stopped = checker.feed(text[start:end])
        emitted += piece
    assert (emitted + checker.flush(), stopped) == search_whole_text(text, words, include)


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab", max_size=20), word=st.text("ab", min_size=1, max_size=6))
def test_holds_back_no_more_than_it_must(text: str, word: str) -> None:
    checker = StopChecker([word], False)
    emitted = "".join(checker.feed(char)[0] for char in text)
    expected, stopped = search_whole_text(text, [word], False)
    if not stopped:
        possible = [k for k in range(len(word)) if expected.endswith(word[:k])]
        assert len(expected) - len(emitted) == max(possible)


def test_across_token_boundaries() -> None:
    checker = StopChecker(["<|end|>"], False)
    assert checker.feed("Hi <|e") == ("Hi ", False)
    assert checker.feed("n") == ("", False)
    assert checker.feed("d|> more") == ("", True)
    assert checker.feed("later") == ("", True)
    assert checker.flush() == ""


def test_include_in_output() -> None:
    checker = StopChecker(["\n\n"], True)
    assert checker.feed("a\n") == ("a", False)
    assert checker.feed("\nb") == ("\n\n", True)


def test_without_stop_words_everything_passes() -> None:
    checker = StopChecker([], False)
    assert checker.feed("text") == ("text", False)
    assert checker.flush() == ""


def test_empty_stop_words_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="at least one character"):
        StopChecker(["ok", ""], False)
