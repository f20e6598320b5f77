"""What a quantization run keeps on disk so that an interrupted one goes on: settings, windows, finished layers.

It knows no model. The folder lies beside the output, under its name with `.partial`; files appear whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmdeploy.models.weight_files import TensorInfo
from lmdeploy.models.weights import Value
from lmdeploy.quantization.packing import AffineTensor
from lmdeploy.quantization.scaled import ScaledTensor

_SETTINGS = "settings.json"
_WINDOWS = "windows.safetensors"
_Q4, _Q8, _SCALED, _SCALES, _MINS = ":q4", ":q8", ":scaled", ":scales", ":mins"


class Partial:
    """The folder of one run. is_resumed: whether it already held a run with the same settings."""

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        """Open the folder, emptied unless it belongs to a run with equal settings. Raises OSError if it cannot be made."""
        self.path = output.with_name(output.name + ".partial")
        wanted = json.dumps(settings, indent=2, sort_keys=True)
        known = self.path / _SETTINGS
        self.is_resumed = known.is_file() and known.read_text(encoding="utf-8") == wanted
        if not self.is_resumed and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        known.write_text(wanted, encoding="utf-8")

    def save_windows(self, windows: Tensor, source: str) -> None:
        """The calibration's token ids [W, S], and where they came from."""
        _save({"windows": windows.to(torch.int32)}, self.path / _WINDOWS, {"source": source})

    def load_windows(self) -> tuple[Tensor, str] | None:
        """What save_windows stored, if anything."""
        file = self.path / _WINDOWS
        if not file.is_file():
            return None
        with safe_open(file, framework="pt") as stored:
            return stored.get_tensor("windows").long(), (stored.metadata() or {})["source"]

    def save_layer(self, index: int, tensors: Mapping[str, Value], report: Mapping[str, Any]) -> None:
        """A layer's tensors under their checkpoint names, and its errors."""
        flat: dict[str, Tensor] = {}
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                flat[name] = value
            elif isinstance(value, AffineTensor):
                form = _Q4 if value.bits == 4 else _Q8
                flat |= {name + form: value.q, name + _SCALES: value.scales, name + _MINS: value.mins}
            else:
                flat |= {name + _SCALED: value.q, name + _SCALES: value.scales}
        flat = {name: value.contiguous() for name, value in flat.items()}
        _save(flat, self._layer_file(index), {"report": json.dumps(report)})

    def load_layer(self, index: int) -> StoredLayer | None:
        """A finished layer, None if there is none or it cannot be read."""
        file = self._layer_file(index)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as stored:
                report = json.loads((stored.metadata() or {})["report"])
            return StoredLayer(load_file(file), report)
        except (SafetensorError, KeyError, ValueError):
            return None

    def remove(self) -> None:
        """The run is over."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _layer_file(self, index: int) -> Path:
        return self.path / f"layer-{index:05}.safetensors"


class StoredLayer:
    """A finished layer as a source of tensors. report: what was saved with it."""

    def __init__(self, flat: dict[str, Tensor], report: dict[str, Any]) -> None:
        self._flat = flat
        self.report = report
        self._forms: dict[str, str] = {}
        for key in flat:
            name, colon, form = key.rpartition(":")
            if colon + form not in (_SCALES, _MINS):
                self._forms[name if colon else key] = colon + form if colon else ""
        self.infos = {name: self._info(name, form) for name, form in self._forms.items()}

    def read(self, name: str) -> Value:
        form = self._forms[name]
        q = self._flat[name + form]
        if not form:
            return q
        scales = self._flat[name + _SCALES]
        if form == _SCALED:
            return ScaledTensor(q, scales, q.shape[1])
        return AffineTensor(q, scales, self._flat[name + _MINS], 4 if form == _Q4 else 8)

    def _info(self, name: str, form: str) -> TensorInfo:
        q = self._flat[name + form]
        kinds = {"": "dense", _Q4: "affine4", _Q8: "affine8", _SCALED: str(q.dtype).removeprefix("torch.")}
        return TensorInfo(tuple(q.shape), kinds[form])


def _save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Write under another name first."""
    draft = file.with_suffix(".tmp")
    try:
        save_file(tensors, draft, metadata=metadata)
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
