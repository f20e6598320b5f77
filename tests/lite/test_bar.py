"""Progress in a terminal and in a log."""

from __future__ import annotations

import pytest

from lmdeploy.lite import bar


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 100, 10))
    monkeypatch.setattr(bar, "monotonic", lambda: next(clock))
    with bar.progress_bar("layers", 4) as advance:
        for _ in range(4):
            advance()
    shown = capsys.readouterr()
    assert shown.err.splitlines() == ["layers 2/4 in 0:00:20, 0:00:20 left", "layers 4/4 in 0:00:40, 0:00:00 left"]
    assert shown.out == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with bar.progress_bar("layers", 2) as advance:
        advance()
        advance()
    shown = capsys.readouterr().err
    assert "layers" in shown
    assert "2/2" in shown
    assert "left" in shown
