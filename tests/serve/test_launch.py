"""`lmdeploy.serve(...)` starts a real server and ends it; `lmdeploy.client(...)` talks to one."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lmdeploy
from lmdeploy import ChatTemplateConfig, PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.errors import ConfigError
from lmdeploy.serve.launch import engine_arguments
from lmdeploy.serve.openai.api_client import APIClient
from tests.cli.command_line import ROOT, parse


def test_a_server_from_python(tiny: Path) -> None:
    template = ChatTemplateConfig(model_name="chatml", meta_instruction="be brief")
    start = importlib.import_module("lmdeploy.serve")
    served = start(
        str(tiny), "name", chat_template_config=template, server_port=0, api_keys=["k", "l"],
        session_len=128, cache_max_entry_count=16,
    )  # fmt: skip
    with served:
        assert isinstance(served, APIClient)
        assert served.available_models == ["name"]
        (answer,) = served.chat_completions_v1("name", "hello", max_tokens=4)
        assert answer["usage"]["completion_tokens"] <= 4
        assert served.model_cards()[0]["max_model_len"] == 128
        plain, _ = served.encode("hello")
        rendered, _ = served.encode("hello", do_preprocess=True)
        assert len(rendered) > len(plain) + 10  # the system text of the template
        with lmdeploy.client(served.api_server_url, "l") as other:
            assert other.is_ready()
            assert other.available_models == ["name"]
    assert served.process.returncode == 0
    served.close()


def test_a_server_that_does_not_start() -> None:
    with pytest.raises(ConfigError, match=r"did not start \(exit status 1\): model '/no/such/model'"):
        lmdeploy.serve("/no/such/model", server_port=0)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="unknown argument sesion_len"):
        lmdeploy.serve("/no/such/model", sesion_len=1)  # type: ignore[operator]


def test_the_server_ends_with_the_process(tiny: Path) -> None:
    code = f"import lmdeploy; s = lmdeploy.serve({str(tiny)!r}, server_port=0, cache_max_entry_count=8); print(s.process.pid)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not Path(f"/proc/{result.stdout.strip()}").exists()


@pytest.mark.parametrize("code", ["import lmdeploy; f = lmdeploy.serve", "from lmdeploy import serve as f"])
def test_the_name_is_a_package_and_can_be_called(code: str) -> None:
    code += "; import sys, lmdeploy.serve.settings; assert lmdeploy.serve is f and callable(f); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "False\n"


def test_configs_become_flags() -> None:
    config = TurbomindEngineConfig(
        session_len=5,
        quant_policy=8,
        enable_prefix_caching=True,
        hf_overrides={"a": 1},
        async_=0,
        cache_max_entry_count=0.5,
    )
    args = parse(f"lmdeploy serve api_server M {' '.join(quoted(engine_arguments(config)))}")
    assert (args.session_len, args.quant_policy, args.enable_prefix_caching) == (5, 8, True)
    assert (args.hf_overrides, args.async_, args.cache_max_entry_count) == ({"a": 1}, 0, 0.5)
    torch = PytorchEngineConfig(block_size=16, device_type="cpu", adapters={"a": "/b"}, eager_mode=True)
    args = parse(f"lmdeploy serve api_server M {' '.join(quoted(engine_arguments(torch)))}")
    assert (args.backend, args.cache_block_seq_len, args.device_type) == ("pytorch", 16, "cpu")
    assert args.adapters == ["a=/b"]
    assert args.eager_mode
    assert engine_arguments(TurbomindEngineConfig()) == ["--backend", "turbomind"]


def quoted(words: list[str]) -> list[str]:
    return [f"'{word}'" for word in words]
