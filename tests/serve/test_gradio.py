"""What the gradio page says and does, over a scripted engine; the browser's part is in test_browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmdeploy.errors import InvalidParameter, RequestError
from lmdeploy.serve.gradio.conversation import MAX_IMAGE_BYTES, Controls, answer, read_image, shown, user_turn
from tests.cli.fake_engine import FakeEngine
from tests.serve.driver import HELLO, endless

PNG = bytes.fromhex("89504e470d0a1a0a")
IMAGES = Path(__file__).parent.parent.parent / "docs" / "images"


def test_an_answer_grows_after_the_turns() -> None:
    engine: Any = FakeEngine(["one", "two"])
    controls = Controls("  be brief ", 9, 0.5, 0.6, 7)
    grown = list(answer(engine, HELLO, controls))
    assert [turns[-1] for turns in grown] == [{"role": "assistant", "content": text} for text in ("o", "on", "one")]
    assert all(turns[:-1] == HELLO for turns in grown)
    assert engine.prompts == [[{"role": "system", "content": "be brief"}, *HELLO]]
    config = engine.configs[0]
    assert (config.max_new_tokens, config.temperature, config.top_p, config.top_k) == (9, 0.5, 0.6, 7)
    list(answer(engine, HELLO, Controls()))
    assert engine.prompts[1] == HELLO


def test_closing_ends_the_answer() -> None:
    engine: Any = FakeEngine(["a long answer"])
    grown = answer(engine, HELLO, Controls())
    next(grown)
    grown.close()
    assert engine.num_closed_early == 1


def test_a_refusal_is_raised() -> None:
    engine: Any = FakeEngine([InvalidParameter("no such thing")])
    with pytest.raises(RequestError, match="no such thing"):
        list(answer(engine, HELLO, Controls()))


def test_images(serve: Any, tmp_path: Path) -> None:
    picture, text = tmp_path / "cat.png", tmp_path / "cat.txt"
    picture.write_bytes(PNG)
    text.write_bytes(PNG)
    seeing: Any = FakeEngine()
    seeing.encode = lambda prompt: [1]
    image = read_image(seeing, str(picture))
    assert image == "data:image/png;base64,iVBORw0KGgo="
    turns = [user_turn("what is it?", image)]
    assert shown(turns) == [
        {"role": "user", "content": f"![image]({image})"},
        {"role": "user", "content": "what is it?"},
    ]
    with pytest.raises(InvalidParameter, match=r"cat\.txt is no image"):
        read_image(seeing, str(text))
    with pytest.raises(InvalidParameter, match="This model takes no images"):
        read_image(serve().engine, str(picture))
    picture.write_bytes(bytes(MAX_IMAGE_BYTES + 1))
    with pytest.raises(InvalidParameter, match="at most"):
        read_image(seeing, str(picture))


def test_the_page_over_an_engine(serve: Any) -> None:
    """Built, with nothing offered as an API; a click's functions do what the widgets show."""
    app = pytest.importorskip("lmdeploy.serve.gradio.app", reason="needs gradio")
    served = serve(endless)
    page = app.make_page(served.engine, app.PageSettings("tiny", "be brief"))
    functions = {block.name: block.fn for block in page.fns.values()}
    assert all(block.api_visibility == "private" for block in page.fns.values())
    assert page.analytics_enabled is False
    text, turns, image, *_ = functions["begin"](" hello ", [], None, False)
    assert (text, turns, image) == ("", HELLO, None)
    assert functions["begin"]("  ", [], None, False)[1] == []
    with pytest.raises(app.gr.Error, match="Stop the answer first"):
        functions["begin"]("hello", [], None, True)
    run = functions["go_on"](turns, "", 5, 0.0, 1.0, 0)
    kept, gallery = list(run)[-1]
    assert kept == gallery
    assert [turn["role"] for turn in kept] == ["user", "assistant"]
    with pytest.warns(UserWarning, match="session_len is 256"):  # shown on the page where there is one
        kept, _ = list(functions["go_on"]([user_turn("x " * 400, None)], "", 5, 0.0, 1.0, 0))[-1]
    assert kept == []
    labels = {component.label for component in page.blocks.values() if getattr(component, "label", None)}
    assert labels >= {"Instruction", "Upload Image", "Maximum new tokens", "Temperature (0: greedy)", "Top_p"}


@pytest.mark.parametrize("name", ["chat_page", "chat_page_phone", "gradio", "gradio_phone"])
def test_the_pictures_are_small(name: str) -> None:
    data = (IMAGES / f"{name}.png").read_bytes()
    assert data.startswith(PNG)
    assert 5_000 < len(data) < 300_000
