"""From a model to a quantized folder: calibration, layer by layer, export, proof of quality.

It owns the order of the steps and what is said meanwhile; every step's work is elsewhere, and the format is a scheme's.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.lite import naming
from lmdeploy.lite.bar import progress_bar
from lmdeploy.lite.calibrate import STATISTICS_FILES
from lmdeploy.lite.compare import compare_models, num_steps
from lmdeploy.lite.export import (
    ShardWriter,
    copy_companions,
    full_disk_is_an_error,
    publish,
    storable,
    write_config,
    write_json,
)
from lmdeploy.lite.layer import (
    Hidden,
    LayerRunner,
    QuantizedLayer,
    check_finite,
    check_sense,
    move,
    quantize_layer,
    quantize_layer_blindly,
)
from lmdeploy.lite.moments import install_recorder
from lmdeploy.lite.partial import Partial, StoredLayer
from lmdeploy.lite.report import (
    SAMPLE_PROMPTS,
    Run,
    format_quality,
    model_name,
    quality,
    sample_answers,
    write_report,
)
from lmdeploy.lite.schemes import Scheme, input_sizes, make_scheme
from lmdeploy.lite.settings import SMOOTH_QUANT, Settings
from lmdeploy.lite.stream import LayerStream
from lmdeploy.lite.windows import TEXT_FILE, Windows, make_windows
from lmdeploy.models.weights import dense

_TOKENS_AT_A_TIME = 4096
_SCORED_TOKENS = 8192
Tell = Callable[[str], None]


@torch.inference_mode()
def quantize_model(model: Path, settings: Settings, tell: Tell) -> dict[str, Any]:
    """Quantize the model at `model` into settings.work_dir; returns the figures of quality.json.

    An interrupted run goes on where it was if it is started again with the same settings. Raises LMDeployError.
    """
    output = _output_folder(model, settings.work_dir)
    stream = LayerStream(model, torch.device(settings.device))
    _check_unquantized(stream)
    scheme = make_scheme(stream, settings)
    _check_fit(stream, scheme)
    _tell_group_size(stream, settings, scheme, tell)
    for name in STATISTICS_FILES:
        if (output / name).exists():
            tell(f"{output / name} is not read: weights are fitted to the text itself; calibrating anew")
            break
    with full_disk_is_an_error(output):
        partial = Partial(output, _fingerprint(model, stream, settings, scheme))
        windows = _windows(model, partial, settings, tell)
        _quantize_layers(stream, partial, windows, scheme, settings, tell)
        draft, unconverted = _assemble(stream, partial, scheme)
        if unconverted:
            kinds = dict.fromkeys(naming.without_numbers(name) for name in unconverted)
            tell(f"kept in 16 bits: {', '.join(kinds)}")
        figures = _prove(stream, draft, partial, windows, scheme, settings, tell)
        publish(draft, output)
        partial.remove()
    tell(f"written to {settings.work_dir}")
    return figures


def _output_folder(model: Path, work_dir: Path) -> Path:
    """The folder by its full path, which has a name to put `.partial` behind. Raises ConfigError for one that cannot be it."""
    output = Path(os.path.abspath(work_dir))
    if output.resolve() == model.resolve():
        raise ConfigError(f"--work-dir {work_dir} is the model itself; choose another folder")
    if not output.name or (output.exists() and not output.is_dir()):
        raise ConfigError(f"--work-dir {work_dir} is no folder that a model can be written to; choose another")
    return output


def _check_unquantized(stream: LayerStream) -> None:
    """Raise ConfigError for a model whose config or tensors are quantized; GGUF files are taken as they are."""
    if stream.path.is_file():
        return
    kinds = {info.kind for info in stream.source.infos.values()} - {"dense"}
    if stream.config.quantization or kinds:
        found = (stream.config.quantization or {}).get("quant_method") or ", ".join(sorted(kinds))
        raise ConfigError(f"{stream.path} is quantized already ({found}); give the original 16-bit model")


def _check_fit(stream: LayerStream, scheme: Scheme) -> None:
    """Raise ConfigError if the format can hold none of the layers' linears, and look for damage outside the layers."""
    layers = enumerate(stream.model.layers)
    if not any(naming.convertible_linears(naming.layer_origins(stream, i), i, m, scheme.fits) for i, m in layers):
        sizes = ", ".join(map(str, sorted(set(input_sizes(stream)))))
        raise ConfigError(
            f"{scheme.title} can hold none of this model's linears: {scheme.needs}, and they have {sizes} inputs; run the "
            "model as it is"
        )
    for name, value in naming.outside_layers(stream):
        storable(name, value, scheme.dtype)


def _tell_group_size(stream: LayerStream, settings: Settings, scheme: Scheme, tell: Tell) -> None:
    size = scheme.config([]).get("group_size", settings.w_group_size)
    if settings.command != SMOOTH_QUANT and size != settings.w_group_size:
        sizes = ", ".join(map(str, sorted(set(input_sizes(stream)))))
        tell(f"groups of {settings.w_group_size} do not divide this model's sizes ({sizes}); using {size}")


def _fingerprint(model: Path, stream: LayerStream, settings: Settings, scheme: Scheme) -> dict[str, Any]:
    """What must be equal for a finished layer to be used again."""
    files = [model] if model.is_file() else sorted(model.glob("*.safetensors")) + sorted(model.glob("*.bin"))
    text = Path(settings.calib_dataset).expanduser()
    return {
        "model": [_stamp(file) for file in files],
        "layers": stream.num_layers,
        "calibration": [settings.calib_dataset, settings.calib_samples, settings.calib_seqlen],
        "text": _stamp(text) if text.is_file() else None,
        "batch_size": settings.batch_size,
        "scheme": scheme.key,
        "device": settings.device,
    }


def _stamp(file: Path) -> list[Any]:
    """What changes with a file's content."""
    return [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]


def _windows(model: Path, partial: Partial, settings: Settings, tell: Tell) -> Windows:
    """The windows of the run; those of an interrupted one are the same."""
    stored = partial.load_windows()
    if stored is not None:
        tell(f"going on with an interrupted run, calibrated on {stored[1]}")
        return Windows.of(*stored, is_blind=settings.calib_samples == 0)
    try:
        windows = make_windows(model, settings, partial.path, tell)
    except BaseException:
        partial.remove()  # there is nothing in it to go on with
        raise
    partial.save_windows(windows.ids, windows.source)
    return windows


def _quantize_layers(
    stream: LayerStream, partial: Partial, windows: Windows, scheme: Scheme, settings: Settings, tell: Tell
) -> None:
    """Make every layer's file, reading instead of computing those that are there."""
    hidden = None if settings.calib_samples == 0 else _hidden(stream, windows, settings.batch_size)
    run = LayerRunner(stream, windows.ids.shape[1])
    with progress_bar("layers", stream.num_layers) as advance:
        for index in range(stream.num_layers):
            stored = partial.load_layer(index)
            try:
                if hidden is not None:
                    _pass_layer(run, partial, index, stored, hidden, scheme)
                elif stored is None:
                    _round_layer(stream, partial, index, scheme)
            except CheckpointError as error:
                raise CheckpointError(f"layer {index}, {error}") from error
            if hidden is not None:
                check_finite(hidden.original, index)
                check_finite(hidden.quantized, index)
                check_sense(hidden, index)
            stream.drop_layer(index)
            advance()


def _round_layer(stream: LayerStream, partial: Partial, index: int, scheme: Scheme) -> None:
    """Quantize a layer without any text."""
    layer, origins = stream.load_layer(index), naming.layer_origins(stream, index)
    convertible = naming.convertible_linears(origins, index, layer, scheme.fits)
    result = quantize_layer_blindly(layer, scheme.recipe, convertible.__contains__)
    _save(stream, partial, layer, index, origins, result)


def _hidden(stream: LayerStream, windows: Windows, least: int) -> Hidden:
    embedded = stream.embed(windows.ids)
    batch_size = max(least, _TOKENS_AT_A_TIME // windows.ids.shape[1], 1)
    return Hidden(embedded, embedded.clone(), windows.num_held_out, batch_size)


def _pass_layer(
    run: LayerRunner, partial: Partial, index: int, stored: StoredLayer | None, hidden: Hidden, scheme: Scheme
) -> None:
    """Quantize a layer, or fill it with what an interrupted run has stored, and move the hidden states behind it."""
    stream = run.stream
    original = stream.load_layer(index)
    layer = copy.deepcopy(original)
    if stored is not None:
        stream.fill_layer(layer, index, stored)
        for module in (original, layer):  # the same arithmetic, bit by bit, as in the run that was interrupted
            install_recorder(module)
        move(run, original, layer, hidden)
        return
    origins = naming.layer_origins(stream, index)
    convertible = naming.convertible_linears(origins, index, layer, scheme.fits)
    writable = naming.writable_modules(origins, index)
    result = quantize_layer(
        run, original, layer, hidden, scheme.recipe, convertible.__contains__, writable.__contains__
    )
    _save(stream, partial, layer, index, origins, result)


def _save(
    stream: LayerStream,
    partial: Partial,
    layer: nn.Module,
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


def _assemble(stream: LayerStream, partial: Partial, scheme: Scheme) -> tuple[Path, list[str]]:
    """The finished folder under a temporary name, and the linears of the layers that stay in 16 bits."""
    draft = partial.path / "output"
    draft.mkdir(exist_ok=True)
    for old in draft.iterdir():
        old.unlink()
    writer = ShardWriter(draft)
    unconverted: list[str] = []
    for name, value in naming.outside_layers(stream):
        writer.add(name, storable(name, value, scheme.dtype))
    for index in range(stream.num_layers):
        stored = _stored(partial, index)
        for name, info in stored.infos.items():
            module, weight = name.removesuffix(".weight"), stored.read(name)
            if not isinstance(weight, Tensor):
                for tensor_name, tensor in scheme.tensors(module, weight).items():
                    writer.add(tensor_name, tensor)
                continue
            if len(info.shape) > 1 and not name.endswith("bias"):
                unconverted.append(module)
            writer.add(name, storable(name, weight, scheme.dtype))
    writer.finish()
    write_config(stream.path, draft, scheme.config(unconverted), scheme.dtype)
    copy_companions(stream.path, draft)
    for file, content in scheme.files(unconverted).items():
        write_json(draft / file, content)
    text = partial.path / TEXT_FILE
    if text.exists():
        (draft / text.name).write_bytes(text.read_bytes())
    return draft, unconverted


def _prove(
    stream: LayerStream,
    draft: Path,
    partial: Partial,
    windows: Windows,
    scheme: Scheme,
    settings: Settings,
    tell: Tell,
) -> dict[str, Any]:
    """Compare the written folder with the original on the held-out windows, and write the report into it."""
    held_out = windows.held_out[: max(1, _SCORED_TOKENS // windows.ids.shape[1])]
    with progress_bar("comparing", num_steps(stream.num_layers)) as advance:
        comparison = compare_models(stream.path, draft, held_out, torch.device(settings.device), advance)
    figures = quality(comparison, draft, stream.num_parameters(), windows.source)
    tell(format_quality(figures, comparison.num_scored))
    answers: list[tuple[str, str, str]] = []
    if settings.samples:
        both = [sample_answers(path, settings.device) for path in (stream.path, draft)]
        answers = list(zip(SAMPLE_PROMPTS, *both, strict=True))
    layers = [_stored(partial, index).report for index in range(stream.num_layers)]
    run = Run(model_name(stream.path), scheme.title, scheme.command, scheme.summary)
    if not write_report(draft, figures, comparison.num_scored, run, layers, answers):
        tell("no plot of the layers' errors: matplotlib is not installed (pip install 'lmdeploy[lite]')")
    return figures


def _stored(partial: Partial, index: int) -> StoredLayer:
    stored = partial.load_layer(index)
    if stored is None:
        raise ConfigError(f"{partial.path} has lost layer {index}; start the command again")
    return stored
