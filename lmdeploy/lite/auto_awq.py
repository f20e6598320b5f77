"""`lmdeploy lite auto_awq` from a model to a folder: calibration, layer by layer, export, proof of quality.

It owns the order of the steps and what is said meanwhile; every step's work is elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmdeploy.errors import ConfigError, LMDeployError
from lmdeploy.lite import calibration_data, naming
from lmdeploy.lite.compare import compare_models, num_steps
from lmdeploy.lite.export import ShardWriter, copy_companions, publish, storable, write_config
from lmdeploy.lite.grids import GridSpec
from lmdeploy.lite.layer import Hidden, LayerRunner, QuantizedLayer, check_finite, move, quantize_layer
from lmdeploy.lite.partial import Partial, StoredLayer
from lmdeploy.lite.report import SAMPLE_PROMPTS, format_quality, quality, sample_answers, write_report
from lmdeploy.lite.stream import LayerStream, linears_of
from lmdeploy.models.weights import dense
from lmdeploy.quantization.export import awq_config
from lmdeploy.tokenizer import Tokenizer

GROUP_SIZES = (128, 64, 32)
_TOKENS_AT_A_TIME = 4096
_HELD_OUT_SHARE = 8  # one window in so many
_SCORED_TOKENS = 8192
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What the flags of the command say. dtype: of what stays in 16 bits; batch_size 1: windows are batched by tokens."""

    work_dir: Path
    calib_dataset: str = "wikitext2"
    calib_samples: int = 128
    calib_seqlen: int = 2048
    batch_size: int = 1
    search: str = "best"
    w_bits: int = 4
    w_group_size: int = 128
    w_sym: bool = False
    dtype: str = "auto"
    device: str = "cpu"
    samples: bool = True

    def __post_init__(self) -> None:
        if self.w_bits != 4:
            raise ConfigError(f"--w-bits {self.w_bits}: the AWQ format has 4 bits")
        if self.w_group_size not in GROUP_SIZES:
            raise ConfigError(f"--w-group-size {self.w_group_size}: use 32, 64 or 128")
        for name in ("calib_samples", "calib_seqlen"):
            if getattr(self, name) < 2:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 2")
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size {self.batch_size}: at least 1")


@torch.inference_mode()
def auto_awq(model: Path, settings: Settings, tell: Tell) -> dict[str, Any]:
    """Quantize the model at `model` into settings.work_dir; returns the figures of quality.json.

    An interrupted run goes on where it was if it is started again with the same settings. Raises LMDeployError.
    """
    device = torch.device(settings.device)
    stream = LayerStream(model, device)
    if not model.is_file() and stream.config.quantization:
        method = stream.config.quantization.get("quant_method")
        raise ConfigError(f"{model} is quantized already ({method}); give the original 16-bit model")
    spec = GridSpec(4, _group_size(stream, settings, tell), settings.w_sym, _scale_dtype(stream, settings))
    partial = Partial(settings.work_dir, _fingerprint(model, stream, settings, spec))
    try:
        windows, calibration = _windows(model, partial, settings, tell)
    except LMDeployError:
        partial.remove()
        raise
    _quantize_layers(stream, partial, windows, spec, settings, tell)
    draft = _assemble(stream, partial, spec, tell)
    figures = _prove(stream, draft, partial, windows, calibration, spec, settings, tell)
    publish(draft, settings.work_dir)
    partial.remove()
    tell(f"written to {settings.work_dir}")
    return figures


def _group_size(stream: LayerStream, settings: Settings, tell: Tell) -> int:
    """The wanted size, or a smaller one that divides the inputs of more linears; what it does not divide stays in 16 bits."""
    columns = [linear.in_features for layer in stream.model.layers for linear in linears_of(layer).values()]
    wanted = settings.w_group_size
    chosen = max(
        (size for size in GROUP_SIZES if size <= wanted),
        key=lambda size: (sum(count for count in columns if count % size == 0), size),
    )
    if chosen != wanted:
        sizes = ", ".join(map(str, sorted(set(columns))))
        tell(f"groups of {wanted} do not divide this model's sizes ({sizes}); using {chosen}")
    return chosen


def _scale_dtype(stream: LayerStream, settings: Settings) -> torch.dtype:
    name = stream.config.dtype if settings.dtype == "auto" else settings.dtype
    return torch.bfloat16 if name == "bfloat16" else torch.float16


def _fingerprint(model: Path, stream: LayerStream, settings: Settings, spec: GridSpec) -> dict[str, Any]:
    """What must be equal for a finished layer to be used again."""
    files = [model] if model.is_file() else sorted(model.glob("*.safetensors")) + sorted(model.glob("*.bin"))
    return {
        "model": [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "layers": stream.num_layers,
        "calibration": [settings.calib_dataset, settings.calib_samples, settings.calib_seqlen],
        "search": settings.search,
        "batch_size": settings.batch_size,
        "grid": [spec.bits, spec.group_size, spec.symmetric, str(spec.scale_dtype)],
        "device": settings.device,
    }


def _windows(model: Path, partial: Partial, settings: Settings, tell: Tell) -> tuple[Tensor, str]:
    """Calibration windows [W, S] and a line that says where they come from; from an interrupted run, the same."""
    stored = partial.load_windows()
    if stored is not None:
        tell(f"going on with an interrupted run, calibrated on {stored[1]}")
        return stored
    tokenizer = Tokenizer(model)
    samples, length = settings.calib_samples, settings.calib_seqlen
    held_out = max(1, samples // _HELD_OUT_SHARE)
    source, texts = settings.calib_dataset, None
    if source != calibration_data.SELF:
        try:
            texts = calibration_data.read_texts(source)
        except calibration_data.NotAvailable as reason:
            tell(f"{reason}; the model writes its own calibration text instead")
    if texts is None:
        from lmdeploy.lite.self_calibration import generate_tokens

        length = min(length, 512)
        ids = generate_tokens(model, tokenizer, samples * length, length, settings.device)
        windows = calibration_data.spread_windows(ids, samples, length, held_out)
        source = "text that the model wrote itself"
        (partial.path / "calibration.txt").write_text(tokenizer.decode(ids), encoding="utf-8")
    else:
        windows = calibration_data.cut_windows(texts, tokenizer, samples, length, held_out)
    calibration = f"{Path(source).name}, {windows.shape[0]} windows of {windows.shape[1]} tokens"
    tell(f"calibrating on {calibration}")
    partial.save_windows(windows, calibration)
    return windows, calibration


def _quantize_layers(
    stream: LayerStream, partial: Partial, windows: Tensor, spec: GridSpec, settings: Settings, tell: Tell
) -> None:
    """Make every layer's file, reading instead of computing those that are there."""
    count = len(windows)
    batch_size = max(settings.batch_size, _TOKENS_AT_A_TIME // windows.shape[1], 1)
    embedded = stream.embed(windows)
    hidden = Hidden(embedded, embedded.clone(), max(1, count // _HELD_OUT_SHARE), batch_size)
    run = LayerRunner(stream, windows.shape[1])
    skipped: set[str] = set()
    with progress_bar("layers", stream.num_layers) as advance:
        for index in range(stream.num_layers):
            original = stream.load_layer(index)
            layer = copy.deepcopy(original)
            origins = naming.layer_origins(stream, index)
            stored = partial.load_layer(index)
            if stored is not None:
                stream.fill_layer(layer, index, stored)
                move(run, original, layer, hidden)
            else:
                convertible = naming.convertible_linears(origins, index, layer, spec.group_size)
                writable = naming.writable_modules(origins, index)
                skipped |= {path for path in naming.linear_paths(origins, index, layer) if path not in convertible}
                result = quantize_layer(
                    run, original, layer, hidden, spec, settings.search, convertible.__contains__, writable.__contains__
                )
                _save(stream, partial, layer, index, origins, result)
            check_finite(hidden.original, index)
            check_finite(hidden.quantized, index)
            stream.drop_layer(index)
            advance()
    if skipped:
        tell(f"kept in 16 bits, since the AWQ format cannot hold them: {', '.join(sorted(skipped))}")


def _save(
    stream: LayerStream,
    partial: Partial,
    layer: torch.nn.Module,
    index: int,
    origins: list[naming.Origin],
    result: QuantizedLayer,
) -> None:
    tensors = {}
    for origin in origins:
        if origin.is_reversible:
            tensors[origin.name] = naming.restored(origin, layer, index, result.weights)
        else:
            tensors[origin.name] = dense(stream.source.read(origin.name))
    partial.save_layer(index, tensors, {path: list(error) for path, error in result.errors.items()})


def _assemble(stream: LayerStream, partial: Partial, spec: GridSpec, tell: Tell) -> Path:
    """The finished folder under a temporary name."""
    draft = partial.path / "output"
    draft.mkdir(exist_ok=True)
    for old in draft.iterdir():
        old.unlink()
    writer = ShardWriter(draft)
    unconverted: list[str] = []
    for name, value in naming.outside_layers(stream):
        for tensor_name, tensor in storable(name, value, spec.scale_dtype):
            writer.add(tensor_name, tensor)
    for index in range(stream.num_layers):
        stored = _stored(partial, index)
        for name, info in stored.infos.items():
            if info.kind == "dense" and len(info.shape) > 1 and name.endswith(".weight"):
                unconverted.append(name.removesuffix(".weight"))
            for tensor_name, tensor in storable(name, stored.read(name), spec.scale_dtype):
                writer.add(tensor_name, tensor)
    writer.finish()
    quantization = awq_config(spec.group_size, not spec.symmetric, unconverted)
    write_config(stream.path, draft, quantization, spec.scale_dtype)
    copy_companions(stream.path, draft)
    text = partial.path / "calibration.txt"
    if text.exists():
        (draft / text.name).write_bytes(text.read_bytes())
    return draft


def _prove(
    stream: LayerStream,
    draft: Path,
    partial: Partial,
    windows: Tensor,
    calibration: str,
    spec: GridSpec,
    settings: Settings,
    tell: Tell,
) -> dict[str, Any]:
    """Compare the written folder with the original on the held-out windows, and write the report into it."""
    held_out = windows[-max(1, len(windows) // _HELD_OUT_SHARE) :][: max(1, _SCORED_TOKENS // windows.shape[1])]
    with progress_bar("comparing", num_steps(stream.num_layers)) as advance:
        comparison = compare_models(stream.path, draft, held_out, torch.device(settings.device), advance)
    figures = quality(comparison, draft, stream.num_parameters(), calibration)
    tell(format_quality(figures, comparison.num_scored))
    answers: list[tuple[str, str, str]] = []
    if settings.samples:
        both = [sample_answers(path, settings.device) for path in (stream.path, draft)]
        answers = list(zip(SAMPLE_PROMPTS, *both, strict=True))
    described = {"model": stream.path.name, "bits": spec.bits, "group_size": spec.group_size, "search": settings.search}
    layers = [_stored(partial, index).report for index in range(stream.num_layers)]
    write_report(draft, figures, comparison.num_scored, described, layers, answers)
    return figures


def _stored(partial: Partial, index: int) -> StoredLayer:
    stored = partial.load_layer(index)
    if stored is None:
        raise ConfigError(f"{partial.path} has lost layer {index}; start the command again")
    return stored


@contextmanager
def progress_bar(title: str, count: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr with the time left; the value advances it by one."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=count)
        yield lambda: bar.advance(task)
