"""Calibration text: from a local file or folder, or a data set's name, to token windows. It knows no model.

Named sets come through the optional `datasets` library, from repositories that need no script.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmdeploy.errors import ConfigError
from lmdeploy.tokenizer import Tokenizer

SELF = "self"
_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet", ".csv")
_TEXT_KEYS = (
    "text",
    "content",
    "prompt",
    "instruction",
    "question",
    "input",
    "sentence",
    "output",
    "response",
    "answer",
)
_MAX_CHARACTERS = 20_000_000

# Name -> the arguments of datasets.load_dataset.
NAMED_SETS: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
    "c4": {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"},
    "ptb": {
        "path": "parquet",
        "data_files": "hf://datasets/ptb-text-only/ptb_text_only@refs/convert/parquet/penn_treebank/train/0000.parquet",
        "split": "train",
    },
    "pileval": {"path": "mit-han-lab/pile-val-backup", "split": "validation"},
    "gsm8k": {"path": "openai/gsm8k", "name": "main", "split": "train"},
    "neuralmagic_calibration": {"path": "neuralmagic/calibration", "name": "LLM", "split": "train"},
    "open-platypus": {"path": "garage-bAInd/Open-Platypus", "split": "train"},
    # Streamed: the whole set is 24 GB.
    "openwebtext": {"path": "Skylion007/openwebtext", "split": "train", "streaming": True},
}


class NotAvailable(Exception):
    """A named set cannot be had here; the message says why."""


def read_texts(source: str) -> list[str]:
    """The texts of a local file or folder, or of a named set.

    Raises ConfigError for a file that is not there, empty or of no known kind, NotAvailable for a name that cannot be fetched.
    """
    path = Path(os.path.expanduser(source))
    if path.exists():
        texts = list(_read_local(path))
    elif source in NAMED_SETS:
        texts = list(_read_named(source))
    else:
        raise ConfigError(
            f"calibration text {source!r} is neither a file nor a folder nor one of {', '.join(NAMED_SETS)}, {SELF}"
        )
    if not any(text.strip() for text in texts):
        raise ConfigError(f"calibration text {source!r} is empty; give a file with some text in it")
    return texts


def cut_windows(texts: Iterable[str], tokenizer: Tokenizer, samples: int, length: int, held_out: int) -> Tensor:
    """Token ids [samples, length] of windows spread evenly over the texts, fewer if the texts are shorter; no begin token.

    The last `held_out` windows come from the end of the texts. Raises ConfigError if there are not enough tokens for two.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_bos=False)
    return spread_windows(ids, samples, length, held_out)


def spread_windows(ids: list[int], samples: int, length: int, held_out: int) -> Tensor:
    """As cut_windows, of one list of tokens."""
    available = len(ids) // length
    if available < 2:
        raise ConfigError(
            f"the calibration text has {len(ids)} tokens, and two windows of --calib-seqlen {length} are the least; "
            "give more text or a smaller --calib-seqlen"
        )
    count = min(samples, available)
    fitted = count - min(held_out, count - 1)
    room = available - (count - fitted)
    starts = [int(i * room / fitted) * length for i in range(fitted)]
    starts += [(room + i) * length for i in range(count - fitted)]
    return torch.tensor([ids[start : start + length] for start in starts])


def _read_local(path: Path) -> Iterator[str]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
        if not files:
            raise ConfigError(f"calibration folder {path} holds no {', '.join(_SUFFIXES)} file")
        for file in files:
            yield from _read_local(file)
        return
    suffix = path.suffix.lower()
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}
    if suffix not in _SUFFIXES:
        raise ConfigError(f"calibration file {path} has no known suffix: {', '.join(_SUFFIXES)}")
    try:
        if suffix in readers:
            yield from readers[suffix](path)
        else:
            yield path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"calibration file {path} cannot be read: {error}") from error


def _read_jsonl(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield record_text(json.loads(line))


def _read_json(path: Path) -> Iterator[str]:
    content = json.loads(path.read_text(encoding="utf-8"))
    for record in content if isinstance(content, list) else [content]:
        yield record_text(record)


def _read_csv(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            yield record_text(row)


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path}: reading parquet needs pyarrow; pip install 'lmdeploy[lite]'") from error
    for batch in parquet.ParquetFile(path).iter_batches():
        for record in batch.to_pylist():
            yield record_text(record)


def record_text(record: Any) -> str:
    """The text of a record: its messages one after another, or its known text fields, or all its strings."""
    if isinstance(record, str):
        return record
    if not isinstance(record, Mapping):
        return ""
    for key in ("messages", "conversations", "conversation"):
        turns = record.get(key)
        if isinstance(turns, list):
            return "\n".join(
                str(turn.get("content") or turn.get("value") or "") for turn in turns if isinstance(turn, Mapping)
            )
    texts = [record[key] for key in _TEXT_KEYS if isinstance(record.get(key), str)]
    texts = texts or [value for value in record.values() if isinstance(value, str)]
    return "\n".join(texts)


def _read_named(name: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise NotAvailable("the `datasets` library is not installed (pip install 'lmdeploy[lite]')") from error
    try:
        rows = datasets.load_dataset(**NAMED_SETS[name])
        size = 0
        for row in rows:
            text = record_text(row)
            size += len(text)
            yield text
            if size > _MAX_CHARACTERS:
                return
    except Exception as error:  # the library raises many kinds, of its own and of its network stack
        reason = str(error).split("\n")[0] or type(error).__name__
        raise NotAvailable(f"{name} cannot be fetched: {reason}") from error


def first_windows(texts: Iterable[str], tokenizer: Tokenizer, samples: int, length: int) -> Tensor:
    """Consecutive windows [samples, length] from the beginning of the texts, without a begin token. Raises ConfigError."""
    if samples < 1 or length < 2:
        raise ConfigError(f"--samples {samples}, --seqlen {length}: at least 1 window of at least 2 tokens")
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text, add_bos=False)
        if len(ids) >= samples * length:
            break
    count = min(samples, len(ids) // length)
    if count < 1:
        raise ConfigError(f"the text has {len(ids)} tokens, fewer than one window of {length}: give a smaller --seqlen")
    return torch.tensor(ids[: count * length]).view(count, length)
