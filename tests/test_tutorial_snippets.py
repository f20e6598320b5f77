"""The Python of the tutorials as their readers type it, with the built-in model or a tiny one in place of the named ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import lmdeploy
from lmdeploy import ChatTemplateConfig, GenerationConfig, Response, TurbomindEngineConfig, hub, pipeline
from lmdeploy.engine import memory
from lmdeploy.errors import InvalidParameter, LMDeployError
from tests.tiny_model import make_tiny_llama


@pytest.fixture(scope="module", autouse=True)
def machine() -> Iterable[None]:
    """A machine with 256 MiB free, so that the default cache is small and shares of it can be compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "device_memory", lambda device: (1 << 30, 1 << 28))
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def builtin() -> str:
    try:
        return str(hub.resolve(None))
    except LMDeployError as error:
        pytest.skip(f"the built-in model cannot be fetched: {error}")


@pytest.fixture(scope="module")
def builtin_pipe(builtin: str) -> Iterable[lmdeploy.Pipeline]:
    with pipeline(builtin, backend_config=TurbomindEngineConfig(session_len=512)) as pipe:
        yield pipe


def test_importing_the_package_is_light() -> None:
    code = "import sys, lmdeploy; print('torch' in sys.modules, lmdeploy.__version__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", lmdeploy.__version__]


def test_batch_of_two_prompts(builtin_pipe: lmdeploy.Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    response = builtin_pipe(["Hi, pls intro yourself", "上海是"], gen_config=GenerationConfig(max_new_tokens=24))
    print(response)
    assert [type(one) for one in response] == [Response, Response]
    assert all(one.text and one.finish_reason in ("stop", "length") for one in response)
    assert capsys.readouterr().out.startswith("[Response(text=")


def test_the_default_limit_is_512_tokens(tiny: str) -> None:
    pipe = pipeline(tiny, backend_config=TurbomindEngineConfig(session_len=2048))
    response = pipe(["Hi, pls intro yourself"], gen_config=GenerationConfig(ignore_eos=True))
    assert response[0].generate_token_len == 512
    pipe.close()


def test_the_built_in_model_goes_on_with_a_text_as_it_should(builtin_pipe: lmdeploy.Pipeline) -> None:
    response = builtin_pipe("The capital of France is", GenerationConfig(max_new_tokens=8), do_preprocess=False)
    assert response.text.startswith(" Paris")
    assert response.finish_reason in ("stop", "length")


def test_a_smaller_share_of_memory_gives_fewer_blocks(tiny: str) -> None:
    backend_config = TurbomindEngineConfig(cache_max_entry_count=0.2)
    with pipeline(tiny, backend_config=backend_config) as pipe:
        response = pipe(["Hi, pls intro yourself", "上海是"], gen_config=GenerationConfig(max_new_tokens=4))
        few = pipe.async_engine.client.info.num_blocks
    assert len(response) == 2
    with pipeline(tiny, backend_config=TurbomindEngineConfig(cache_max_entry_count=0.4)) as pipe:
        assert pipe.async_engine.client.info.num_blocks == pytest.approx(2 * few, rel=0.01)


def test_model_format_need_not_be_said(builtin: str) -> None:
    """The tutorial opens a 4-bit model without model_format; the built-in model is 4-bit too."""
    with pipeline(builtin, backend_config=TurbomindEngineConfig(cache_max_entry_count=0.4, session_len=256)) as pipe:
        assert pipe("Hi, pls intro yourself", GenerationConfig(max_new_tokens=4)).text


def test_engine_settings_as_arguments_of_pipeline(tiny: str) -> None:
    with pipeline(tiny, model_format="hf", tp=1, cache_max_entry_count=0.3) as pipe:
        assert pipe("hi", GenerationConfig(max_new_tokens=2)).generate_token_len <= 2


def test_chat_template_from_json(tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "template.json"
    file.write_text(json.dumps({"model_name": "internlm2", "meta_instruction": "be brief"}), encoding="utf-8")
    with pipeline(tiny, chat_template_config=ChatTemplateConfig.from_json(str(file))) as pipe:
        ids = pipe.async_engine.encode("hi")
        assert "be brief" in pipe.tokenizer.decode(ids, skip_special_tokens=False)


def test_an_image_is_refused_in_one_clear_sentence(tiny: str) -> None:
    with pipeline(tiny) as pipe, pytest.raises(InvalidParameter, match="vision models are not supported yet"):
        pipe(("describe this image", object()))


def test_the_turbomind_class(tiny: str) -> None:
    from lmdeploy import turbomind as tm

    query = "hello"
    tm_model = tm.TurboMind.from_pretrained(tiny, model_name="internlm-chat-20b")
    generator = tm_model.create_instance()
    prompt = tm_model.model.get_prompt(query)
    input_ids = tm_model.tokenizer.encode(prompt)
    collected: list[Any] = []
    for outputs in generator.stream_infer(session_id=0, input_ids=[input_ids]):
        res, tokens = outputs[0]
        collected.append((res.tolist(), tokens))
    assert len(collected) == 1
    assert 0 < collected[0][1] == len(collected[0][0]) <= 512
    response = tm_model.tokenizer.decode(res.tolist())
    assert isinstance(response, str)
    tm_model.close()
