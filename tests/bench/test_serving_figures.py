"""Percentiles, goodput, ratios; prompts and their lengths; the parser of answers, cut anywhere."""

from __future__ import annotations

import json
import random
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.bench.serving_figures import compare, keeps, latencies, parse_slo, percentile, summarize
from lmdeploy.bench.serving_http import AnswerParser
from lmdeploy.bench.serving_load import Run, StreamReader, Trace
from lmdeploy.bench.serving_plot import plot_latencies
from lmdeploy.bench.serving_prompts import chat_like_asks, file_asks, random_asks
from lmdeploy.errors import ConfigError
from tests.bench.fake_server import chunk


def trace(due: float = 0.0, first: float = 1.0, gap: float = 0.1, count: int = 5, tokens: int = 5) -> Trace:
    arrivals = [due + first + gap * number for number in range(count)]
    return Trace(due, due, arrivals[-1] + 0.5, arrivals, 10, tokens)


def test_latencies_of_a_request() -> None:
    assert latencies(trace()) == pytest.approx({"ttft": 1.0, "tpot": 0.1, "e2e": 1.9})
    assert latencies(trace(tokens=9)) == pytest.approx({"ttft": 1.0, "tpot": 0.05, "e2e": 1.9})
    assert latencies(trace(count=1, tokens=1)) == pytest.approx({"ttft": 1.0, "e2e": 1.5})
    late = Trace(0.0, 2.0, 4.0, [3.0], 1, 1)  # the client was late: that is the server's not to gain
    assert latencies(late) == {"e2e": 4.0, "ttft": 3.0}


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, percent) for percent in (50, 90, 99)] == [50.0, 90.0, 99.0]
    assert percentile([3.0], 99) == 3.0
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0


def test_figures_of_runs() -> None:
    bad = Trace(0.0, 0.0, 0.2, [], 0, 0, "429 queue_full")
    runs = [Run([trace(), bad], 2.0, 0.1), Run([trace(first=3.0), trace()], 4.0, 0.3)]
    figures = summarize(runs, {"ttft": 2.0})
    assert (figures["requests"], figures["completed"], figures["errors"]) == (4, 3, {"429 queue_full": 1})
    assert figures["output_tok_s"] == pytest.approx(15 / 6)
    assert figures["total_tok_s"] == pytest.approx(45 / 6)
    assert (figures["goodput_s"], figures["slo_share"]) == (pytest.approx(2 / 6), 0.5)
    assert (figures["ttft_p50_s"], figures["ttft_p99_s"]) == (pytest.approx(1.0), pytest.approx(3.0))
    assert figures["itl_mean_s"] == pytest.approx(0.1)
    assert figures["client_cpu_share"] == 0.3
    assert "ttft_p50_s" not in summarize([Run([bad], 1.0, 0.0)])


def test_slo() -> None:
    assert parse_slo("ttft=200ms, tpot=0.05s,e2e=10s") == pytest.approx({"ttft": 0.2, "tpot": 0.05, "e2e": 10.0})
    assert keeps(trace(), {"ttft": 1.0, "tpot": 0.11})
    assert not keeps(trace(), {"tpot": 0.09})
    assert keeps(trace(count=1, tokens=1), {"tpot": 0.09})  # a single token has no time between two
    for text in ("", "ttft", "ttft=3", "itl=3ms", "ttft=-3ms"):
        with pytest.raises(ConfigError, match="write for example"):
            parse_slo(text)


def test_ratios_of_medians() -> None:
    first = [{"ttft_p50_s": value, "goodput_s": 0.0} for value in (1.0, 2.0, 9.0)]
    second = [{"ttft_p50_s": value, "goodput_s": 1.0} for value in (3.0, 3.0, 3.0)]
    ratios = compare(first, second)
    assert set(ratios) == {"ttft_p50_s"}
    assert ratios["ttft_p50_s"] == pytest.approx({"ratio": 1.5, "min": 3 / 9, "max": 3.0})


def test_random_prompts_have_their_lengths() -> None:
    asks = random_asks(20, 30, 7, random.Random(0))
    assert {len(ask.text().split()) for ask in asks} == {30}
    assert {ask.max_tokens for ask in asks} == {7}
    assert len({ask.text() for ask in asks}) == 20
    assert asks == random_asks(20, 30, 7, random.Random(0))


def test_chat_like_lengths_are_skewed_about_their_means() -> None:
    asks = chat_like_asks(4000, 160, 340, random.Random(0))
    prompts, answers = [len(ask.text().split()) for ask in asks], [ask.max_tokens for ask in asks]
    for lengths, goal in ((prompts, 160), (answers, 340)):
        assert 0.75 * goal < mean(lengths) < 1.1 * goal
        assert median(lengths) < 0.65 * goal
        assert min(lengths) >= 1
        assert max(lengths) <= 6 * goal


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    chats = [
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "For ten words " * 5}]},
        {"conversations": [{"from": "human", "value": "alone"}]},
        {"conversations": []},
    ]
    path.write_text(json.dumps(chats))
    asks = file_asks(path, 3, None, random.Random(0))
    assert [(ask.prompt, ask.max_tokens) for ask in asks] == [("Why?", 20)] * 3  # 15 words
    messages = [{"role": "user", "content": "Hi"}]
    path.write_text("\n".join(map(json.dumps, ({"prompt": "a", "max_tokens": 5}, {"messages": messages}, 7))))
    asks = file_asks(path, 2, None, random.Random(0))
    assert sorted((ask.text(), ask.max_tokens) for ask in asks) == [("Hi", 128), ("a", 5)]
    assert {ask.max_tokens for ask in file_asks(path, 2, 9, random.Random(0))} == {9}
    assert sorted(str(ask.messages()) for ask in asks) == sorted(
        [str(messages), str([{"role": "user", "content": "a"}])]
    )
    for text in ("", "[]", '{"x": 1}', "{", "[1, "):
        path.write_text(text)
        with pytest.raises(ConfigError):
            file_asks(path, 1, None, random.Random(0))


STREAM = b"".join(
    [
        b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"6;x=y\r\ndata: \r\n",  # an event in two chunks, the first with an extension
        chunk(b'{"choices": [{"delta": {"content": "one"}}]}\n\n'),
        chunk(b': a comment\n\ndata:{"choices":[{"text":"two"}]}\r\n\r\n'),
        chunk(b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}\n\ndata: [DONE]\r\n\r\n'),
        b"0\r\nx-trailer: 1\r\n\r\n",
    ]
)


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_a_stream_may_be_cut_anywhere(cuts: list[int]) -> None:
    result = Trace(0.0)
    reader = StreamReader(result)
    parser = AnswerParser(reader.feed)
    edges = sorted({0, *cuts, len(STREAM)})
    for number, (start, stop) in enumerate(pairwise(edges)):
        parser.feed(STREAM[start:stop], float(number))
    assert (parser.status, parser.is_complete, parser.is_kept_alive, reader.is_done) == (200, True, True, True)
    assert (result.prompt_tokens, result.output_tokens, len(result.arrivals), result.error) == (3, 5, 2, None)


def test_bodies_with_a_length_and_without() -> None:
    got = bytearray()
    parser = AnswerParser(lambda data, when: got.extend(data))
    parser.feed(b"HTTP/1.1 404 No\r\nContent-Length: 5\r\nConnection: close\r\n\r\nab", 0.0)
    assert not parser.is_complete
    parser.feed(b"cde", 0.0)
    assert (parser.is_complete, parser.is_kept_alive, bytes(got)) == (True, False, b"abcde")
    parser = AnswerParser(lambda data, when: got.extend(data))
    parser.feed(b"HTTP/1.0 200 OK\r\n\r\nxyz", 0.0)
    assert (parser.is_complete, parser.ends_with_connection, bytes(got)) == (False, True, b"abcdexyz")
    for text in (b"220 mail\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"x" * (65 << 10)):
        with pytest.raises(ValueError, match=r"not an answer|Content-Length|too long"):
            AnswerParser(lambda data, when: None).feed(text, 0.0)
    parser = AnswerParser(lambda data, when: None)
    with pytest.raises(ValueError, match="size of a chunk"):
        parser.feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 0.0)


def test_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    samples = {"ttft": [0.1], "tpot": [], "itl": [], "e2e": [0.2]}
    assert not plot_latencies({"a": samples}, "title", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
