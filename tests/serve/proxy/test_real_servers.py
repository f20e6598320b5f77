"""The commands as an operator runs them: a proxy, three servers of two models that join it, one of them killed under load."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import openai
import pytest

from tests.cli.command_line import ROOT
from tests.serve.proxy.conftest import wait_for

pytestmark = pytest.mark.slow

KEY = "the key"
SERVER = [
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--cache-max-entry-count",
    "256",
    "--server-port",
    "0",
    "--api-keys",
    KEY,
]


@contextmanager
def command(kind: str, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `lmdeploy serve ...` and its address; killed in the end."""
    line = [sys.executable, "-m", "lmdeploy", "serve", kind, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env) as process:
        try:
            yield process, address(process)
        finally:
            process.kill()


def address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if found := re.search(r"at (http://\S+); Ctrl-C", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return found[1]
    raise AssertionError(f"it did not start: {told}")


def test_three_servers_of_two_models(tiny: Path) -> None:
    """Of 90 requests none is lost that had not begun to stream, whichever server has it when that is killed."""
    with ExitStack() as stack:
        _, url = stack.enter_context(
            command(
                "proxy", "--server-port", "0", "--api-keys", KEY, "--disable-cache-status", "--strategy", "cache_aware"
            )
        )
        servers = [
            stack.enter_context(command("api_server", str(tiny), *SERVER, "--model-name", name, "--proxy-url", url))
            for name in ("one", "one", "two")
        ]
        http = stack.enter_context(httpx2.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {KEY}"}))
        client = stack.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60))
        wait_for(lambda: len(http.get("/nodes/status").json()) == 3, 20)
        assert sorted(model.id for model in client.models.list()) == ["one", "two"]

        def ask(number: int) -> str:
            fields = {"model": "two" if number % 3 == 2 else "one", "max_tokens": 40, "prompt": f"the river {number}"}
            body = {**fields, "ignore_eos": True, "stream": number % 2 == 0}
            try:
                with http.stream("POST", "/v1/completions", json=body) as answer:
                    lines = list(answer.iter_lines())
            except httpx2.HTTPError as error:
                return repr(error)
            if answer.status_code != 200:
                return f"{answer.status_code} {lines}"
            if any("failed midway" in line for line in lines):
                return "broken" if "data: {" in lines[0] and "failed midway" not in lines[0] else "lost"
            if body["stream"]:
                return "whole" if "data: [DONE]" in lines else f"cut {lines}"
            return "whole" if json.loads("".join(lines))["usage"]["completion_tokens"] == 40 else f"cut {lines}"

        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(ask, number) for number in range(90)]
            wait_for(lambda: sum(answer.done() for answer in answers) >= 15, 30)
            servers[0][0].send_signal(signal.SIGKILL)
            outcomes = [answer.result() for answer in answers]
        assert set(outcomes) <= {"whole", "broken"}
        assert outcomes.count("broken") <= 12  # of those that streamed from it at that moment
        assert all(outcome == "whole" for outcome in outcomes[1::2])  # what did not stream is never lost
        metrics = http.get("/metrics").text
        assert f'retries_total{{node="{servers[0][1]}"}}' in metrics or outcomes.count(
            "broken"
        )  # it had work when it died
        status = http.get("/nodes/status").json()
        assert [status[server[1]]["state"] for server in servers] == ["open", "closed", "closed"]
        check_that_a_server_leaves(http, servers[1])


def check_that_a_server_leaves(http: httpx2.Client, server: tuple[subprocess.Popen[str], str]) -> None:
    """One that is told to end says so, and its requests end before it does."""
    process, address = server
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    wait_for(lambda: address not in http.get("/nodes/status").json())
    assert process.wait(20) == 0
    assert time.monotonic() - start < 15
