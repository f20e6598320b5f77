"""`lmdeploy check_env`: its sections, its files, and the file type that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from lmdeploy import __version__
from lmdeploy.cli import check_env, main


def test_report_and_json_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "env.json"
    assert main.main(["check_env", "--dump-file", str(file)]) == 0
    text = capsys.readouterr().out
    report = json.loads(file.read_text(encoding="utf-8"))
    assert list(report) == ["lmdeploy", "python", "packages", "torch", "cpu", "gpu", "kernels"]
    assert report["lmdeploy"]["version"] == __version__
    assert report["torch"]["version"] == torch.__version__ == report["packages"]["torch"]
    assert "GiB" in report["cpu"]["memory"]
    assert "compiled for" in report["kernels"]["on the CPU"] or "PyTorch" in report["kernels"]["on the CPU"]
    for section in report:
        assert f"{section}:" in text.splitlines()


def test_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["check_env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["python"]["version"].startswith("3.")


def test_yaml_says_the_same() -> None:
    report = {"a": {"plain": "text", "odd: key": 'with "quotes", # and \\ and 中文', "no": "yes"}, "empty": {}}
    assert yaml.safe_load(check_env.as_yaml(report)) == report


@pytest.mark.parametrize("name", ["env.yml", "env.yaml", "env.txt"])
def test_other_files(name: str, tmp_path: Path) -> None:
    check_env.dump({"section": {"name": "value"}}, tmp_path / name)
    assert "value" in (tmp_path / name).read_text(encoding="utf-8")


def test_files_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, reason in (("env.pkl", "run any code"), ("env.xml", "unknown file type '.xml'")):
        assert main.main(["check_env", "--dump-file", str(tmp_path / name)]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""  # refused before anything is measured
        assert reason in captured.err
    assert main.main(["check_env", "--dump-file", str(tmp_path / "no" / "such.json")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_secrets_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("LMDEPLOY_LOG_LEVEL", "INFO")
    report = check_env.collect()
    assert report["lmdeploy"]["LMDEPLOY_LOG_LEVEL"] == "INFO"
    assert "hf_secret" not in json.dumps(report)
