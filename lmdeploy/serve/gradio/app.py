"""The widgets of the chat page, and the web server around them. What is said is `conversation`'s matter.

`python -m lmdeploy.serve.gradio.app MODEL|URL` is `lmdeploy serve gradio MODEL|URL`.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

# Before the first import of gradio: no page view is reported to anyone, no version looked up.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from lmdeploy.errors import ConfigError, LMDeployError
from lmdeploy.serve.gradio.conversation import MAX_IMAGE_BYTES, Controls, Turn, answer, read_image, shown, user_turn

if TYPE_CHECKING:
    from lmdeploy.async_engine import AsyncEngine
    from lmdeploy.serve.remote import RemoteEngine

_MAX_ANSWERS = 64  # at once; the engine batches them
_KEPT_S = (600, 3600)  # every 10 minutes, pictures that were uploaded more than an hour ago are deleted
_CSS = """
footer { display: none !important }
.gradio-container { max-width: 60rem !important; margin: 0 auto !important }
#chat { min-height: 40vh }
#ask textarea { font-size: 16px }  /* below that, phones zoom in */
@media (max-width: 640px) {
  .gradio-container { width: 100% !important }
  .gradio-container .main { padding: 0.5rem !important }
  #buttons { flex-wrap: nowrap; gap: 0.5rem }
  #buttons > * { flex: 1 1 auto !important }
  #buttons button { min-width: 0; padding-left: 0.25rem; padding-right: 0.25rem; font-size: 0.85rem; white-space: nowrap }
  #chat .message-buttons { display: none }
}
"""
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO_FONTS = ["ui-monospace", "Menlo", "Consolas", "monospace"]


@dataclass(frozen=True)
class PageSettings:
    """name: the model's, in the title. system: the system text that the page begins with."""

    name: str
    system: str = ""
    host: str = "127.0.0.1"
    port: int = 6006
    is_shared: bool = False


def run_page(engine: AsyncEngine | RemoteEngine, settings: PageSettings, tell: Callable[[str], None]) -> int:
    """Serve the page until SIGINT or SIGTERM. tell: for the line that says where it is. Raises ConfigError."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    page = make_page(engine, settings)
    try:
        launch(page, settings)
        tell(f"chat with {settings.name} at {page.share_url or page.local_url}; Ctrl-C ends it")
        ended.wait()
    finally:
        page.close(verbose=False)
    return 0


def launch(page: gr.Blocks, settings: PageSettings) -> None:
    """Serve the page from threads of its own. Raises ConfigError if its port has been taken."""
    try:
        page.launch(
            server_name=settings.host,
            server_port=settings.port,
            share=settings.is_shared,
            prevent_thread_lock=True,
            quiet=True,
            max_threads=_MAX_ANSWERS,
            max_file_size=MAX_IMAGE_BYTES,
            ssr_mode=False,
            footer_links=[],
            enable_monitoring=False,
            theme=gr.themes.Soft(font=_FONTS, font_mono=_MONO_FONTS),
            head=f"<style>{_CSS}</style>",  # as `css` gradio would confine it to what is inside the container
        )
    except OSError as error:
        raise ConfigError(f"cannot listen on {settings.host}:{settings.port}: {error}") from error


def make_page(engine: AsyncEngine | RemoteEngine, settings: PageSettings) -> gr.Blocks:
    """The page, not yet served."""
    with gr.Blocks(
        title=f"{settings.name} · LMDeploy", analytics_enabled=False, fill_height=True, delete_cache=_KEPT_S
    ) as page:
        turns, image = gr.State([]), gr.State(None)
        gr.Markdown(f"### {settings.name}")
        chat = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            scale=1,
            buttons=["copy"],
            feedback_options=None,
            allow_tags=False,
            reasoning_tags=[("<think>", "</think>")],
            placeholder="Ask something below.",
        )
        ask = gr.Textbox(
            elem_id="ask", label="Instruction", placeholder="Enter sends", lines=1, max_lines=8, autofocus=True
        )
        with gr.Row(elem_id="buttons"):
            upload = gr.UploadButton("Upload Image", file_types=["image"], size="md", min_width=60)
            reset = gr.Button("Reset", size="md", min_width=60)
            stop = gr.Button("Stop", variant="stop", size="md", min_width=60, interactive=False)
            send = gr.Button("Send", variant="primary", size="md", min_width=60)
        controls = _controls(settings.system)
        _connect(engine, turns, image, chat, ask, [upload, reset, stop, send], controls)
    page.queue(default_concurrency_limit=_MAX_ANSWERS)
    return page


def _controls(system: str) -> list[Any]:
    """In the order of the fields of Controls."""
    default = Controls()
    with gr.Accordion("Settings", open=False):
        text = gr.Textbox(label="System text", value=system, lines=2)
        with gr.Row():
            length = gr.Slider(1, 2048, default.max_new_tokens, step=1, label="Maximum new tokens")
            temperature = gr.Slider(0, 2, default.temperature, step=0.05, label="Temperature (0: greedy)")
        with gr.Row():
            top_p = gr.Slider(0.01, 1, default.top_p, step=0.01, label="Top_p")
            top_k = gr.Slider(0, 200, default.top_k, step=1, label="Top_k (0: off)")
    return [text, length, temperature, top_p, top_k]


def _connect(
    engine: AsyncEngine | RemoteEngine, turns: Any, image: Any, chat: Any, ask: Any, buttons: list[Any], controls: Any
) -> None:
    """What happens on a click. Nothing is offered as an API: the server's own is the better one."""
    upload, reset, stop, send = buttons
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    is_busy = gr.State(False)
    state = [is_busy, stop, send]

    def begin(text: str, old: list[Turn], picture: str | None, busy: bool) -> tuple[Any, ...]:
        if busy:
            raise gr.Error("Stop the answer first, or wait for its end.", title="Not yet", print_exception=False)
        if not text.strip():
            return text, old, picture, shown(old), *idle()
        new = [*old, user_turn(text.strip(), picture)]
        return "", new, None, shown(new), True, gr.Button(interactive=True), gr.Button(interactive=False)

    def go_on(old: list[Turn], *values: Any) -> Generator[tuple[Any, Any], None, None]:
        if not old or old[-1]["role"] != "user":
            return
        try:
            for new in answer(engine, old, Controls(*values)):
                yield new, shown(new)
        except LMDeployError as error:
            yield old[:-1], shown(old[:-1])
            gr.Warning(str(error), title="No answer")

    def add_image(path: str) -> str | None:
        try:
            return read_image(engine, path)
        except LMDeployError as error:
            gr.Warning(str(error), title="Image")
            return None

    def idle() -> tuple[Any, ...]:
        return False, gr.Button(interactive=False), gr.Button(interactive=True)

    runs = []
    for trigger in (ask.submit, send.click):
        begun = trigger(begin, [ask, turns, image, is_busy], [ask, turns, image, chat, *state], **private)
        run = begun.success(go_on, [turns, *controls], [turns, chat], **private)
        run.then(idle, None, state, **private)
        runs.append(run)
    upload.upload(add_image, [upload], [image], **private)
    stop.click(idle, None, state, cancels=runs, **private)
    for forget in (reset.click, chat.clear):
        forget(lambda: ([], None, [], *idle()), None, [turns, image, chat, *state], cancels=runs, **private)


if __name__ == "__main__":
    sys.argv[1:1] = ["serve", "gradio"]
    runpy.run_module("lmdeploy", run_name="__main__", alter_sys=True)
