"""What cannot be done is one error, and no folder stands under the output's name."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdeploy.errors import ConfigError
from lmdeploy.lite import calibrate as calibration
from lmdeploy.lite import export, partial, report
from lmdeploy.lite.settings import CalibrationSettings
from tests.lite.checkpoints import make_llama, quantize, write_text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return make_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w_bits": 3}, "--w-bits 3"),
        ({"w_bits": 8}, "--w-bits 8"),
        ({"w_bits": 3, "command": "auto_gptq"}, "--w-bits 3"),
        ({"w_group_size": 100}, "--w-group-size 100"),
        ({"w_group_size": 100, "command": "auto_gptq"}, "--w-group-size 100"),
        ({"quant_dtype": "int3", "command": "smooth_quant"}, "--quant-dtype int3"),
        ({"calib_samples": 1}, "--calib-samples 1"),
        ({"calib_samples": -1}, "--calib-samples -1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"calib_seqlen": 1}, "--calib-seqlen 1"),
        ({"calib_seqlen": 100_000}, "--calib-seqlen 100000"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(model, tmp_path / "out", write_text(tmp_path), **settings)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_missing_and_empty_text_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        quantize(model, tmp_path / "out", tmp_path / "no.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(ConfigError, match="empty"):
        quantize(model, tmp_path / "out", empty)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (partial, "save_file"),
        (export, "save_file"),
        (export, "write_json"),
        (export.shutil, "copyfile"),
        (report, "plot_errors"),
    ],
)
def test_full_disk_is_one_error(
    module: Any, function: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_text(tmp_path)
    monkeypatch.setattr(module, function, no_space)
    with pytest.raises(ConfigError, match=r"out cannot be written \(No space left on device\).*--work-dir"):
        quantize(model, tmp_path / "out", text, search="none")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    quantize(model, tmp_path / "out", text, search="none")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]


def test_work_dir_that_cannot_be_made(model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        quantize(model, text / "out", text)


def test_work_dir_that_is_no_folder(model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path)
    for work_dir in (text, Path("/")):
        with pytest.raises(ConfigError, match="is no folder that a model can be written to"):
            quantize(model, work_dir, text)
    assert [path.name for path in tmp_path.iterdir()] == ["calib.txt"]


def test_work_dir_is_here(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, text = tmp_path / "here", write_text(tmp_path)
    here.mkdir()
    monkeypatch.chdir(here)
    quantize(model, Path("."), text, search="none")
    assert (here / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.txt", "here"]


def test_model_is_not_overwritten_by_itself(model: Path, tmp_path: Path) -> None:
    before = (model / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="is the model itself"):
        quantize(model, model, write_text(tmp_path))
    assert (model / "model.safetensors").read_bytes() == before


def test_calibration_into_a_file(model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path)
    with pytest.raises(ConfigError, match=r"calib\.txt is no folder"):
        calibration.calibrate(model, CalibrationSettings(text, str(text), 4, 32), lambda text: None)
    assert text.read_text()


def test_calibration_onto_a_full_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = CalibrationSettings(tmp_path / "out", str(write_text(tmp_path)), 4, 32)
    monkeypatch.setattr(calibration.torch, "save", no_space)
    with pytest.raises(ConfigError, match="No space left on device"):
        calibration.calibrate(model, settings, lambda text: None)
    assert not (tmp_path / "out").exists()


def test_earlier_weights_leave_the_folder(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "inputs_stats.pth"):
        (out / name).write_text("old")
    quantize(model, out, write_text(tmp_path), search="none")
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "inputs_stats.pth", "quality.json"} <= names
    assert not names & {"model.safetensors.index.json", "model-00001-of-00002.safetensors"}
