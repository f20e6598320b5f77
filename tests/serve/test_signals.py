"""The command itself as an operator runs it: what signals do to running answers."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

ROOT = Path(__file__).parent.parent.parent
# Long enough to be running still when a signal comes.
BODY = {"model": "tiny", "prompt": "the river", "max_tokens": 19_000, "ignore_eos": True, "stream": True, "n": 4}


@contextmanager
def command(model: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    flags = ["--server-port", "0", "--model-name", "tiny", "--dtype", "float32", "--device", "cpu"]
    line = [sys.executable, "-m", "lmdeploy", "serve", "api_server", str(model), *flags, "--session-len", "20000"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        try:
            for told in process.stderr:
                if found := re.search(r"serving tiny at (http://\S+);", told):
                    threading.Thread(target=process.stderr.read, daemon=True).start()
                    yield process, found[1]
                    return
            raise AssertionError(f"the server did not start: {process.wait()}")
        finally:
            process.kill()


def test_the_first_signal_lets_running_answers_end(tiny: Path) -> None:
    with command(tiny) as (process, url), httpx2.Client(timeout=30) as client:
        short = {**BODY, "max_tokens": 1000}
        with client.stream("POST", f"{url}/v1/completions", json=short) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            ready = 200
            while ready == 200:
                ready = client.get(f"{url}/health/ready").status_code
            assert ready == 503
            assert client.post(f"{url}/v1/completions", json=BODY).status_code == 503
            assert client.get(f"{url}/health/live").status_code == 200
            text = "\n".join(lines)
        assert text.count('"finish_reason":"length"') == 4
        assert "data: [DONE]" in text
        assert process.wait(10) == 0


def test_the_second_signal_ends_at_once(tiny: Path) -> None:
    with (
        command(tiny) as (process, url),
        httpx2.Client(timeout=30) as client,
        client.stream("POST", f"{url}/v1/completions", json=BODY) as answer,
    ):
        lines = answer.iter_lines()  # as long as it is there, the connection stays open
        next(lines)
        process.send_signal(signal.SIGINT)
        while client.get(f"{url}/health/ready").status_code == 200:
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 1
