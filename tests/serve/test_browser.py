"""The chat pages as their readers have them: headless Chromium against real servers of the built-in model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lmdeploy.serve.openai.api_client import APIClient
from tests.serve import browser as driver
from tests.serve.browser import DESKTOP, KEY, PHONE, QUESTION, ROOT, ask_gradio, ask_light_page, open_page

pytest.importorskip("playwright", reason="pip install 'lmdeploy[browser]'")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(driver.chromium() is None, reason="needs Chromium: apt install chromium"),
]
LONG = "Write a very long story about a river."


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    with driver.browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with driver.server() as url:
        yield url


@pytest.fixture(scope="module")
def gradio_url(url: str) -> Iterator[str]:
    pytest.importorskip("gradio", reason="pip install 'lmdeploy[gradio]'")
    with driver.gradio_page(url, "--api-key", KEY) as address:
        yield address


def wait(page: Any, condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it did not come to that")


def check_idle(page: Any, url: str) -> None:
    """The engine has come to know that nobody wants the answer any more."""
    with APIClient(url, KEY) as api:

        def running() -> str:
            with api._ask("GET", "/metrics") as response:
                text = response.read().decode()
            return str(re.findall(r"lmdeploy:num_requests_running{.*} (.*)", text)[0])

        wait(page, lambda: running() == "0.0")


def with_key(browser: Any, url: str, size: dict[str, int] = DESKTOP) -> Any:
    page = open_page(browser, f"{url}/chat", size)
    page.fill("#key", KEY)
    page.press("#key", "Tab")
    page.wait_for_function("() => document.querySelector('#models').value")
    return page


def check_fits(page: Any) -> None:
    """Nothing has to be scrolled sideways."""
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


# ---- /chat ----


def test_the_light_page_asks_for_the_key(chrome: Any, url: str) -> None:
    page = open_page(chrome, f"{url}/chat", DESKTOP)
    page.wait_for_selector("text=This server asks for an API key")
    assert page.is_visible("#key")
    assert page.is_visible("#temperature")


def test_the_light_page_streams_an_answer(chrome: Any, url: str) -> None:
    page = with_key(chrome, url)
    page.evaluate("""() => {
        window.lengths = new Set();
        const look = () => window.lengths.add(document.querySelector('.turn:last-child').innerText.length);
        new MutationObserver(look).observe(document.querySelector('#log'), {childList: true, subtree: true});
    }""")
    ask_light_page(page, QUESTION)
    answer = page.inner_text(".turn:last-child")
    assert "Paris" in answer
    assert re.search(r"\d+ \+ \d+ tokens", answer)
    assert page.evaluate("window.lengths.size") >= 3
    assert page.inner_text("#model") == "smollm2-135m-instruct"
    assert {address.split("/")[2] for address in page.asked if not address.startswith("data:")} == {url.split("/")[2]}
    assert all("401" in text for text in page.told), page.told


def test_the_sliders_go_with_the_question(chrome: Any, url: str) -> None:
    page = with_key(chrome, url)
    page.fill("#system", "Be brief.")
    page.fill("#max_tokens", "3")
    page.fill("#temperature", "0")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask_light_page(page, LONG)
    body = json.loads(sent.value.post_data)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["top_k"]) == (3, 0, 0.8, 50)
    assert "ended by the maximum of tokens" in page.inner_text(".turn:last-child")


def test_the_light_page_stops_and_resets(chrome: Any, url: str) -> None:
    page = with_key(chrome, url)
    page.fill("#max_tokens", "1500")
    page.fill("#prompt", LONG)
    page.click("#send")
    wait(page, lambda: len(page.inner_text(".turn:last-child")) > 20)
    page.click("#stop")
    page.wait_for_selector("text=stopped")
    check_idle(page, url)
    with page.expect_request("**/v1/chat/completions") as sent:
        page.fill("#prompt", LONG)
        page.click("#send")
    roles = [message["role"] for message in json.loads(sent.value.post_data)["messages"]]
    assert roles == ["user", "assistant", "user"]
    page.click("#reset")
    check_idle(page, url)
    assert page.query_selector_all(".turn") == []
    assert page.is_visible("#empty")


ATTACK = (
    "<img src=x onerror='window.bad=1'><script>window.bad=1</script> [x](javascript:bad) **b** `<b>`\n```\n<i>\n```"
)


def test_what_a_model_says_stays_text(chrome: Any, url: str) -> None:
    page = with_key(chrome, url)
    chunk = {"choices": [{"delta": {"content": ATTACK}, "finish_reason": "stop"}]}
    answer = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=answer, content_type="text/event-stream"))
    ask_light_page(page, "<img src=y onerror='window.bad=1'>")
    page.wait_for_selector("pre code")
    assert "<img src=x onerror='window.bad=1'><script>" in page.inner_text(".assistant")
    assert page.inner_text(".user") == "<img src=y onerror='window.bad=1'>"
    assert page.inner_text(".assistant pre") == "<i>"
    assert page.evaluate("window.bad") is None
    assert page.query_selector_all("#log img, #log script, #log a, #log b, #log i") == []
    assert [node.inner_text() for node in page.query_selector_all("#log strong, #log p code")] == ["b", "<b>"]


def test_nothing_can_be_run_from_elsewhere(chrome: Any, url: str) -> None:
    page = with_key(chrome, url)
    page.evaluate("""() => {
        const script = document.createElement('script');
        script.textContent = 'window.bad = 1';
        document.body.append(script);
    }""")
    assert page.evaluate("window.bad") is None
    assert any("Content Security Policy" in text for text in page.told)


def test_a_server_that_fails_is_told(chrome: Any, url: str) -> None:
    page = with_key(chrome, url)
    page.fill("#max_tokens", "99999999999")
    ask_light_page(page, QUESTION)
    page.wait_for_selector(".failed")
    assert "max_tokens" in page.inner_text(".failed")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask_light_page(page, QUESTION)
    wait(page, lambda: len(page.query_selector_all(".failed")) == 2)


def test_the_light_page_fits_a_phone(chrome: Any, url: str) -> None:
    page = with_key(chrome, url, PHONE)
    check_fits(page)
    page.click("#toggle")
    ask_light_page(page, QUESTION + " " + "x" * 200)
    check_fits(page)
    box = page.query_selector("#send").bounding_box()
    assert box["x"] + box["width"] <= PHONE["width"]
    assert box["y"] + box["height"] <= PHONE["height"]
    assert box["height"] >= 40


# ---- gradio ----


def bot_text(page: Any) -> str:
    return " ".join(node.inner_text() for node in page.query_selector_all("#chat .message.bot"))


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_gradio_answers(chrome: Any, gradio_url: str, size: dict[str, int]) -> None:
    page = open_page(chrome, gradio_url, size)
    ask_gradio(page, QUESTION)
    assert "Paris" in bot_text(page)
    check_fits(page)
    assert {address.split("/")[2] for address in page.asked} == {gradio_url.split("/")[2]}


def test_gradio_stops_and_resets(chrome: Any, gradio_url: str, url: str) -> None:
    page = open_page(chrome, gradio_url, DESKTOP)
    page.fill("#ask textarea", LONG)
    page.click("text=Send")
    wait(page, lambda: len(bot_text(page)) > 20)
    page.fill("#ask textarea", QUESTION)
    page.press("#ask textarea", "Enter")
    page.wait_for_selector("text=Stop the answer first")
    assert page.input_value("#ask textarea") == QUESTION
    assert len(page.query_selector_all("#chat .message.bot")) == 1
    page.get_by_role("button", name="Stop", exact=True).click()
    check_idle(page, url)
    page.wait_for_timeout(300)
    kept = bot_text(page)
    page.wait_for_timeout(300)
    assert len(kept) > 20
    assert bot_text(page) == kept
    page.click("text=Reset")
    wait(page, lambda: bot_text(page) == "")
    page.close()


def test_gradio_ends_the_answer_of_a_closed_page(chrome: Any, gradio_url: str, url: str) -> None:
    page, watch = open_page(chrome, gradio_url, DESKTOP), chrome.new_page()
    page.fill("#ask textarea", LONG)
    page.click("text=Send")
    wait(page, lambda: len(bot_text(page)) > 20)
    page.close()
    check_idle(watch, url)
    watch.close()


def test_gradio_refuses_an_image(chrome: Any, gradio_url: str) -> None:
    page = open_page(chrome, gradio_url, DESKTOP)
    page.wait_for_selector("text=Upload Image")
    page.set_input_files("input[type=file]", ROOT / "docs" / "images" / "gradio.png")
    page.wait_for_selector("text=This model takes no images")
    ask_gradio(page, QUESTION)
    assert "Paris" in bot_text(page)


def test_gradio_with_a_model_of_its_own(chrome: Any) -> None:
    pytest.importorskip("gradio")
    with driver.gradio_page("--session-len", "1024", "--cache-max-entry-count", "64") as address:
        page = open_page(chrome, address, DESKTOP)
        ask_gradio(page, QUESTION)
        assert "Paris" in bot_text(page)
        page.close()
