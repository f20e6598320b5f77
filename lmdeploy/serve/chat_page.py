"""The light chat page at /chat: three files of this package, sent as they are. It knows no model.

The page is open without a key; what it asks is asked through /v1, with the key that its reader types.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

PATH = "/chat"
_FOLDER = Path(__file__).parent / "static"
_FILES = {PATH: "chat.html", f"{PATH}/chat.js": "chat.js", f"{PATH}/chat.css": "chat.css"}
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
# Nothing from elsewhere, nothing inline, nobody's frame: the text of a model can do no harm even if it got into the page.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

PATHS = frozenset(_FILES)
router = APIRouter(include_in_schema=False)


@router.get(PATH)
def page() -> Response:
    return _file(PATH)


@router.get(PATH + "/chat.js")
def script() -> Response:
    return _file(f"{PATH}/chat.js")


@router.get(PATH + "/chat.css")
def style() -> Response:
    return _file(f"{PATH}/chat.css")


@cache
def _read(name: str) -> bytes:
    return (_FOLDER / name).read_bytes()


def _file(path: str) -> Response:
    name = _FILES[path]
    return Response(_read(name), headers=_HEADERS, media_type=_TYPES[Path(name).suffix])
