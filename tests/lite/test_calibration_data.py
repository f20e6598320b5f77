"""Every kind of local text gives the same windows; what cannot be had is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lmdeploy.errors import ConfigError
from lmdeploy.lite.calibration_data import NAMED_SETS, NotAvailable, read_texts, record_text, spread_windows
from tests.lite.checkpoints import FakeDatasets

TEXTS = ["The first text, with a comma.", "第二段", 'A "quoted" third\nover two lines']


def write(folder: Path, kind: str) -> Path:
    file = folder / f"text.{kind}"
    records = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    if kind == "jsonl":
        file.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    elif kind == "json":
        file.write_text(json.dumps(records), encoding="utf-8")
    else:
        import csv

        with open(file, "w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, ["id", "text"])
            writer.writeheader()
            writer.writerows(records)
    return file


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_records_of_every_kind(kind: str, tmp_path: Path) -> None:
    assert read_texts(str(write(tmp_path, kind))) == TEXTS


def test_folder_is_all_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\x00")
    assert read_texts(str(tmp_path)) == ["first", "second"]


def test_conversations_and_unknown_fields() -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    assert record_text(chat) == "Hi\nHello"
    assert record_text({"question": "1 + 1?", "answer": "2", "id": "x"}) == "1 + 1?\n2"
    assert record_text({"body": "text of another name"}) == "text of another name"


@pytest.mark.parametrize(("name", "content"), [("x.jsonl", "{broken"), ("x.json", "[1,"), ("x.txt", b"\xff\xfe\x00")])
def test_unreadable_file_is_named(name: str, content: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=name):
        read_texts(str(file))


def test_named_set_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(NotAvailable, match=r"lmdeploy\[lite\]"):
        read_texts("ptb")
    with pytest.raises(ConfigError, match="wikitext2"):
        read_texts("no-such-set")


def test_windows_do_not_overlap_and_judge_by_the_end() -> None:
    windows = spread_windows(list(range(1000)), 8, 50, 2)
    assert windows.shape == (8, 50)
    starts = windows[:, 0].tolist()
    assert starts == sorted(set(starts))
    assert starts[-2:] == [900, 950]
    assert torch.equal(windows[3], torch.arange(starts[3], starts[3] + 50))


def test_short_text_gives_fewer_windows() -> None:
    assert len(spread_windows(list(range(120)), 8, 50, 2)) == 2
    with pytest.raises(ConfigError, match="99 tokens"):
        spread_windows(list(range(99)), 8, 50, 2)


def test_parquet_records(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    parquet.write_table(table, tmp_path / "text.parquet")
    assert read_texts(str(tmp_path / "text.parquet")) == TEXTS
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match=r"broken\.parquet cannot be read"):
        read_texts(str(tmp_path / "broken.parquet"))


@pytest.mark.parametrize("name", NAMED_SETS)
def test_named_set_comes_from_a_source_without_scripts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeDatasets([{"text": text} for text in TEXTS])
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert read_texts(name) == TEXTS
    (options,) = library.asked
    assert "trust_remote_code" not in options
    assert options["path"] == "parquet" or "/" in str(options["path"])


def test_fetching_ends_when_there_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmdeploy.lite.calibration_data._MAX_CHARACTERS", 40)
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets([{"text": "x" * 30}] * 9))
    assert len(read_texts("c4")) == 2


def test_failed_fetch_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline:
        def load_dataset(self, **options: object) -> None:
            raise ConnectionError("no route to the hub\nand a long trace")

    monkeypatch.setitem(sys.modules, "datasets", Offline())
    with pytest.raises(NotAvailable, match=r"^gsm8k cannot be fetched: no route to the hub$"):
        read_texts("gsm8k")
