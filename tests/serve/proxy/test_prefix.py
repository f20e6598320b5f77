"""Chains of digests over a prompt's beginning, and the index of who was sent which."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.serve.proxy.prefix import CHUNK_BYTES, MAX_CHUNKS, Prefix, PrefixIndex, prefix_of, prompt_bytes

LONG = "the river runs past the old mill " * 20


def chat(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text} for text in texts]}


def common(first: Prefix, other: Prefix) -> int:
    return sum(a == b for a, b in zip(first, other, strict=False))


def test_a_conversation_that_goes_on_keeps_its_beginning() -> None:
    first, longer = prefix_of(chat(LONG), "m"), prefix_of(chat(LONG, "answer", LONG), "m")
    assert len(first) == len(prompt_bytes(chat(LONG))) // CHUNK_BYTES > 4
    assert common(first, longer) == len(first)
    assert len(longer) > len(first)


def test_prompts_part_where_they_differ() -> None:
    first, other = prefix_of(chat(LONG + "a" * 500), "m"), prefix_of(chat(LONG + "b" * 500), "m")
    assert 0 < common(first, other) == len(prompt_bytes(chat(LONG))) // CHUNK_BYTES
    assert common(first, prefix_of(chat(LONG), "another model")) == 0
    assert common(prefix_of(chat("x" + LONG), "m"), prefix_of(chat(LONG), "m")) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": LONG},
        {"prompt": [LONG, "another"]},
        {"prompt": list(range(200))},
        {"prompt": [list(range(200)), [5]]},
        {"input_ids": list(range(200))},
        {"input": LONG},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": LONG}]}]},
        {"messages": LONG},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]},
        {"system": [{"type": "text", "text": LONG}], "messages": []},
        {"tools": [{"type": "function", "function": {"name": LONG}}]},
        {"instructions": LONG, "input": "x"},
    ],
)
def test_every_form_of_prompt_counts(fields: dict[str, Any]) -> None:
    assert len(prefix_of(fields, "m")) >= 4
    other = json.loads(json.dumps(fields).replace("river", "brook").replace("[0, 1", "[9, 1"))
    assert other != fields
    assert prefix_of(other, "m") != prefix_of(fields, "m")


def test_only_the_first_of_several_prompts_counts() -> None:
    assert prefix_of({"prompt": [LONG, "x"]}, "m") == prefix_of({"prompt": [LONG]}, "m")
    assert prefix_of({"prompt": [[1] * 200, [2]]}, "m") == prefix_of({"prompt": [[1] * 200]}, "m")
    assert prefix_of({"prompt": [[1] * 200]}, "m") != prefix_of({"prompt": [[2] * 200]}, "m")


@pytest.mark.parametrize(
    "fields", [{}, {"prompt": None}, {"prompt": "short"}, {"messages": [{"role": None}]}, {"input": []}]
)
def test_short_prompts_have_no_prefix(fields: dict[str, Any]) -> None:
    assert prefix_of(fields, "m") == ()


def test_long_prompts_cost_no_more() -> None:
    assert len(prefix_of({"prompt": "x" * (10 << 20)}, "m")) == MAX_CHUNKS
    assert len(prefix_of({"prompt": [7] * (1 << 20)}, "m")) == MAX_CHUNKS


@given(
    st.lists(
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.dictionaries(st.text(), st.text())
        )
    )
)
@settings(max_examples=50)
def test_whatever_a_body_holds(value: list[Any]) -> None:
    body = {"messages": value, "prompt": value, "input": {"x": value}, "tools": value}
    assert prefix_of(body, "m") == prefix_of(body, "m")


def chain(number: int, length: int) -> Prefix:
    """A prompt of a tree in which prompts share what their numbers share."""
    return tuple(f"{number >> (length - depth - 1)}@{depth}".encode() for depth in range(length))


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 63), st.integers(1, 6)), max_size=60), st.integers(1, 30)
)
@settings(max_examples=100)
def test_the_index_matches_as_a_walk_would(prompts: list[tuple[str, int, int]], max_chunks: int) -> None:
    """A chunk never stays without those before it, so the binary search finds what walking along finds."""
    index = PrefixIndex(max_chunks)
    for node, number, length in prompts:
        index.record(node, chain(number >> (6 - length), length))
        assert index.size(node) <= max_chunks
    for node in "ab":
        for number in range(64):
            prefix = chain(number, 6)
            known = [index.count(node, digest) > 0 for digest in prefix]
            walked = known.index(False) if False in known else 6
            assert index.match(node, prefix) == walked == sum(known)


def test_what_was_used_last_is_kept() -> None:
    index = PrefixIndex(max_chunks=6)
    old, new = (b"1", b"2", b"3"), (b"4", b"5", b"6")
    index.record("a", old)
    index.record("a", new)
    index.record("a", old[:1])
    index.record("a", (b"7",))
    assert (index.match("a", old), index.match("a", new)) == (2, 3)
    assert index.count("a", b"1") == 2
    index.forget(["a"])
    assert (index.size("a"), index.match("a", old), index.count("a", b"1")) == (0, 0, 0)
