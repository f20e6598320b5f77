"""One visitor's conversation as data: turns in, turns out, an answer after the other. It knows nothing of gradio."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdeploy.errors import InvalidParameter, RequestError
from lmdeploy.messages import GenerationConfig

if TYPE_CHECKING:
    from lmdeploy.async_engine import AsyncEngine
    from lmdeploy.serve.remote import RemoteEngine

Turn = dict[str, Any]
MAX_IMAGE_BYTES = 8 << 20


@dataclass(frozen=True)
class Controls:
    """What the page's sliders say. temperature 0: greedy. top_k 0: of all tokens."""

    system: str = ""
    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 50

    def config(self) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=int(self.max_new_tokens),
            temperature=float(self.temperature),
            top_p=float(self.top_p),
            top_k=int(self.top_k),
        )


def answer(
    engine: AsyncEngine | RemoteEngine, turns: list[Turn], controls: Controls
) -> Generator[list[Turn], None, None]:
    """`turns` end with the user's; yields them with the model's turn added, as far as it has come.

    Raises RequestError for what the engine refuses, with its reason. Closing the generator ends the answer.
    """
    system = controls.system.strip()
    messages = ([{"role": "system", "content": system}] if system else []) + turns
    text = ""
    with closing(engine.stream([(messages, controls.config())])) as responses:
        for response in responses:
            if response.finish_reason == "error":
                raise RequestError(response.error_message or "the engine refused the prompt")
            text += response.text
            yield [*turns, {"role": "assistant", "content": text}]


def user_turn(text: str, image: str | None) -> Turn:
    """A message of text, or of an image (a data URL) and text."""
    if image is None:
        return {"role": "user", "content": text}
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def read_image(engine: AsyncEngine | RemoteEngine, path: str) -> str:
    """The picture as a data URL, if the model takes pictures; else InvalidParameter that says why."""
    kind = mimetypes.guess_type(path)[0] or ""
    if not kind.startswith("image/"):
        raise InvalidParameter(f"{Path(path).name} is no image")
    data = Path(path).read_bytes()
    if len(data) > MAX_IMAGE_BYTES:
        raise InvalidParameter(f"{Path(path).name} has {len(data):,} bytes; at most {MAX_IMAGE_BYTES:,} are taken")
    image = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    try:
        engine.encode([user_turn("?", image)])
    except RequestError as error:
        raise InvalidParameter(f"This model takes no images ({error}). Ask it in words.") from error
    return image


def shown(turns: list[Turn]) -> list[dict[str, Any]]:
    """The turns as a gallery of messages: an image is a message of its own, in Markdown."""
    found: list[dict[str, Any]] = []
    for turn in turns:
        content = turn["content"]
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            if part["type"] == "text":
                found.append({"role": turn["role"], "content": part["text"]})
            else:
                found.append({"role": turn["role"], "content": f"![image]({part['image_url']['url']})"})
    return found
