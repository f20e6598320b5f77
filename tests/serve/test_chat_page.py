"""The page at /chat as files: who may have it, what it may do. The browser's part is in test_browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lmdeploy.serve import chat_page

TYPES = {"/chat": "text/html", "/chat/chat.js": "text/javascript", "/chat/chat.css": "text/css"}
FOLDER = Path(chat_page.__file__).parent / "static"


@pytest.mark.parametrize("path", sorted(chat_page.PATHS))
def test_the_page_is_open_and_its_calls_are_not(serve: Any, path: str) -> None:
    served = serve(api_keys=("k",))
    answer = served.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(TYPES[path])
    assert served.ask("POST", path, json={}).status_code == 405
    assert served.chat().status_code == 401
    assert served.get(path + "/../v1/models").status_code == 401


def test_what_the_page_may_do(serve: Any) -> None:
    headers = serve().get("/chat").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_is_self_contained() -> None:
    page, script, style = ((FOLDER / name).read_text(encoding="utf-8") for name in ("chat.html", "chat.js", "chat.css"))
    for text in (page, script, style):
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text.replace("// ", ""))
    links = re.findall(r"""(?:src|href)=["']([^"']+)["']""", page)
    assert {"/" + link for link in links if link != "data:,"} | {"/chat"} == chat_page.PATHS
    assert not re.search(r"<script>|<style|\son\w+=|style=", page)
    # The only ways from text to markup.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|srcdoc", script)
    used = set(re.findall(r"""\$\("([\w-]+)"\)""", script))
    assert used
    assert used <= set(re.findall(r'id="([\w-]+)"', page))


def test_the_page_can_be_left_out(serve: Any) -> None:
    assert serve(has_docs=False).get("/chat").status_code == 404
    assert "/chat" not in serve().get("/openapi.json").json()["paths"]
