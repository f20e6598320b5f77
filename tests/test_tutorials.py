"""The command lines of the tutorials, letter by letter and in their order, with tiny models in place of the named ones.

Each flow runs in an empty folder of its own that holds the models under the names that its lines use. What a chat is asked
stands after `<`. Data sets cannot be fetched here, so that models calibrate on text of their own.
"""

from __future__ import annotations

import io
import shlex
import shutil
from pathlib import Path

import pytest

from lmdeploy.cli import main
from lmdeploy.engine import memory
from tests.lite.checkpoints import make_golden, quantize, write_text
from tests.tiny_model import make_tiny_llama

FLOWS: dict[str, tuple[str, ...]] = {
    "chat of 0.3": (
        "lmdeploy chat MODELS/internlm2-chat-1_8b < hello",
        "lmdeploy chat MODELS/internlm2-chat-1_8b --cache-max-entry-count 0.5 < hello",
        "lmdeploy chat MODELS/internlm2-chat-1_8b --cache-max-entry-count 0.01 < write a short story",
    ),
    "chat of 0.5": ("lmdeploy chat MODELS/internlm2_5-7b-chat < hello",),
    "chat of 0.1": (
        "lmdeploy chat turbomind internlm/internlm-chat-20b-4bit --model-name internlm-chat-20b < hello",
        "lmdeploy chat turbomind Qwen/Qwen-7B-Chat --model-name qwen-7b < hello",
        "lmdeploy chat turbomind MODELS/internlm-chat-7b/  --model-name internlm-chat-7b < hello",
    ),
    "4 bits of 0.3": (
        "lmdeploy lite auto_awq MODELS/internlm2-chat-1_8b --calib-dataset 'ptb' --calib-samples 128 --calib-seqlen 1024 "
        "--w-bits 4 --w-group-size 128 --work-dir MODELS/internlm2-chat-1_8b-4bit",
        "lmdeploy chat MODELS/internlm2-chat-1_8b-4bit --model-format awq < hello",
        "lmdeploy chat MODELS/internlm2-chat-1_8b-4bit --model-format awq --cache-max-entry-count 0.01 < hello",
        "lmdeploy chat MODELS/internlm2-chat-1_8b-4bit \\\n   --model-format awq \\\n   --cache-max-entry-count 0.4 < hello",
    ),
    "workspace of 0.1": (
        "lmdeploy convert internlm-chat-7b  MODELS/internlm-chat-7b/",
        "lmdeploy chat turbomind ./workspace < hello",
    ),
    "int8 cache of 0.1": (
        "lmdeploy convert internlm-chat-7b  MODELS/internlm-chat-7b/",
        "lmdeploy lite calibrate --model  MODELS/internlm-chat-7b --calib_dataset \"c4\" --calib_samples 128 "
        "--calib_seqlen 2048 --work_dir ./quant_output",
        "lmdeploy lite kv_qparams --work_dir ./quant_output --turbomind_dir workspace/triton_models/weights/ "
        "--kv_sym False --num_tp 1",
        "edit quant_policy = 0 -> quant_policy = 4",
        "edit use_context_fmha = 1 -> use_context_fmha = 0",
        "lmdeploy chat turbomind ./workspace < hello",
    ),
    "4 bits of 0.1": (
        "lmdeploy lite calibrate --model  MODELS/internlm-chat-7b --calib_dataset \"c4\" --calib_samples 128 "
        "--calib_seqlen 2048 --work_dir ./quant_output",
        "lmdeploy lite auto_awq --model  MODELS/internlm-chat-7b --w_bits 4 --w_group_size 128 --work_dir ./quant_output",
        "lmdeploy convert  internlm-chat-7b ./quant_output --model-format awq --group-size 128 --dst_path ./workspace_quant",
        "lmdeploy chat turbomind ./workspace_quant < hello",
    ),
}  # fmt: skip
# What each flow's standard error has to say at least.
SAID = {
    "chat of 0.1": ("model_name='qwen'", "model_name='internlm'", "`--model-name` is now written `--chat-template`"),
    "workspace of 0.1": ("Next: lmdeploy chat workspace", "model_name='internlm'"),
    "int8 cache of 0.1": ("quant_policy 4 is int8 here", "edited settings are in force"),
}
VISION = (
    "lmdeploy lite auto_awq MODELS/InternVL2-26B --calib-dataset 'ptb' --calib-samples 128 --calib-seqlen 2048 --w-bits 4 "
    "--w-group-size 128 --batch-size 1 --search-scale False --work-dir MODELS/InternVL2-26B-w4a16-4bit",
    "lmdeploy lite auto_awq MODELS/OpenGVLab/Mini-InternVL-Chat-2B-V1-5 --work-dir MODELS/Mini-InternVL-Chat-2B-V1-5-AWQ",
    "lmdeploy lite auto_awq MODELS/Shanghai_AI_Laboratory/internlm-xcomposer2-vl-7b "
    "--work-dir MODELS/internlm-xcomposer2-vl-7b-AWQ",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model and a 4-bit one."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 2048, "num_hidden_layers": 1}
    dense = make_tiny_llama(folder / "dense", **sizes)
    quantize(dense, folder / "4bit", write_text(folder), w_group_size=128, search="none")
    return {"dense": dense, "4bit": folder / "4bit"}


@pytest.fixture
def here(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a flow runs, on a machine with 256 MiB free."""
    for name in (
        "MODELS/internlm2-chat-1_8b",
        "MODELS/internlm2_5-7b-chat",
        "MODELS/internlm-chat-7b",
        "Qwen/Qwen-7B-Chat",
    ):
        shutil.copytree(models["dense"], tmp_path / name)
    shutil.copytree(models["4bit"], tmp_path / "internlm/internlm-chat-20b-4bit")
    monkeypatch.setattr(memory, "device_memory", lambda device: (1 << 30, 1 << 28))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a line in this process; its exit status."""
    words = shlex.split(line.replace("\\\n", " "))
    said = ""
    if "<" in words:
        words, said = words[: words.index("<")], " ".join(words[words.index("<") + 1 :]) + "\n"
    assert words.pop(0) == "lmdeploy"
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    try:
        return main.main(words)
    except SystemExit as error:
        return int(error.code or 0)


def edit_config_ini(change: str) -> None:
    before, after = change.removeprefix("edit ").split(" -> ")
    file = Path("workspace/triton_models/weights/config.ini")
    text = file.read_text(encoding="utf-8")
    assert before in text
    file.write_text(text.replace(before, after), encoding="utf-8")


@pytest.mark.parametrize("flow", FLOWS)
def test_flow(flow: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    everything = ""
    for line in FLOWS[flow]:
        if line.startswith("edit "):
            edit_config_ini(line)
            continue
        status = run(line, monkeypatch)
        out, err = capsys.readouterr()
        assert status == 0, f"{line}\n{err}"
        assert bool(out.strip()) == line.startswith("lmdeploy chat"), line
        everything += err
    for text in SAID.get(flow, ()):
        assert text in everything


@pytest.mark.parametrize("line", ["lmdeploy chat -h", "lmdeploy lite -h", "lmdeploy lite", "lmdeploy convert -h"])
def test_help(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line, monkeypatch) == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("line", VISION)
def test_vision_models_are_refused_in_one_line(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = "xcomposer2/vl-7b" if "xcomposer2" in line else "internvl/internvl2-8b"
    make_golden(golden, tmp_path / shlex.split(line)[3])
    monkeypatch.chdir(tmp_path)
    assert run(line, monkeypatch) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: architecture ")
    assert "is not supported" in error
    assert not [path for path in (tmp_path / "MODELS").iterdir() if path.name.endswith(("-4bit", "-AWQ"))]
