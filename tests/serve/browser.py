"""Drives the chat pages in headless Chromium. `python -m tests.serve.browser` makes the pictures of docs/images anew."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import lmdeploy

ROOT = Path(__file__).parent.parent.parent
QUESTION = "What is the capital of France?"
KEY = "a key"
DESKTOP, PHONE = {"width": 1000, "height": 720}, {"width": 390, "height": 780}
# The machine of the tests has no way out; without these Chromium tries many at a time.
_ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def chromium() -> str | None:
    """The path of an installed Chromium."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium(), args=list(_ARGUMENTS))
        try:
            yield found
        finally:
            found.close()


@contextmanager
def server() -> Iterator[str]:
    """The address of a server of the built-in model, which asks for KEY."""
    with lmdeploy.serve(server_port=0, api_keys=KEY, session_len=2048, cache_max_entry_count=128) as client:  # type: ignore[operator]
        yield client.api_server_url


@contextmanager
def gradio_page(*arguments: str) -> Iterator[str]:
    """The address of `lmdeploy serve gradio ...`."""
    command = [sys.executable, "-m", "lmdeploy", "serve", "gradio", *arguments, "--server-port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stderr is not None
    try:
        yield _address(process.stderr)
    finally:
        process.terminate()
        status = process.wait(20)
    assert status == 0


def _address(told: IO[str]) -> str:
    lines = []
    for line in told:
        lines.append(line)
        if found := re.search(r" at (http://\S+); Ctrl-C ends it", line):
            threading.Thread(target=told.read, daemon=True).start()
            return found[1]
    raise AssertionError("".join(lines))


def open_page(browser: Any, url: str, size: dict[str, int]) -> Any:
    """A page; `told` has the errors of its console, `asked` every address that it asks."""
    context = browser.new_context(
        viewport=size, has_touch=size is PHONE, is_mobile=size is PHONE, device_scale_factor=1
    )
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.told, page.asked = [], []
    page.on("console", lambda message: page.told.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.told.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(url)
    return page


def ask_light_page(page: Any, question: str) -> None:
    page.fill("#prompt", question)
    page.press("#prompt", "Enter")
    page.wait_for_selector(".assistant.busy", state="detached")


def ask_gradio(page: Any, question: str) -> None:
    page.fill("#ask textarea", question)
    page.press("#ask textarea", "Enter")
    page.wait_for_function("() => document.querySelectorAll('#chat .message.bot').length > 0")
    page.wait_for_function("() => [...document.querySelectorAll('button')].find(b => b.innerText == 'Stop').disabled")


def main() -> None:
    folder = ROOT / "docs" / "images"
    with browser() as chrome, server() as url:
        for suffix, size in (("", DESKTOP), ("_phone", PHONE)):
            page = open_page(chrome, f"{url}/chat", size)
            page.fill("#key", KEY)
            page.press("#key", "Tab")
            page.wait_for_function("() => document.querySelector('#models').value")
            page.fill("#temperature", "0")
            page.click("#toggle")
            for question in (QUESTION, "List three fruits."):
                ask_light_page(page, question)
            page.screenshot(path=folder / f"chat_page{suffix}.png")
        with gradio_page(url, "--api-key", KEY) as address:
            for suffix, size in (("", DESKTOP), ("_phone", PHONE)):
                page = open_page(chrome, address, size)
                for question in (QUESTION, "List three fruits."):
                    ask_gradio(page, question)
                page.wait_for_timeout(1500)
                page.screenshot(path=folder / f"gradio{suffix}.png")


if __name__ == "__main__":
    main()
