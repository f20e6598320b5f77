"""What a quantized model cost in quality, for people: quality.json, a README, a plot of each layer's error, sample answers.

It measures nothing but the sizes of files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdeploy.errors import LMDeployError
from lmdeploy.lite.compare import Comparison
from lmdeploy.workspace import WEIGHTS

SAMPLE_PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
)
_SAMPLE_TOKENS = 64
_PLOT = "layer_errors.png"


def quality(comparison: Comparison, folder: Path, num_parameters: int, calibration: str) -> dict[str, Any]:
    """The figures of quality.json. folder: the model's; bytes count its weight files."""
    size = weight_bytes(folder)
    return {
        "ppl_ref": round(comparison.ppl_ref, 4),
        "ppl": round(comparison.ppl, 4),
        "kl": round(comparison.kl, 6),
        "top1": round(comparison.top1, 4),
        "bits_per_weight": round(8 * size / num_parameters, 3),
        "bytes": size,
        "calib": calibration,
    }


def weight_bytes(path: Path) -> int:
    """Bytes of a GGUF file, or of a folder's weight files."""
    if path.is_file():
        return path.stat().st_size
    files = [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]
    return sum(file.stat().st_size for file in files)


def format_quality(figures: Mapping[str, Any], num_scored: int) -> str:
    """The figures as lines of text."""
    return "\n".join(
        [
            f"perplexity        {_short(figures['ppl'])}   (original {_short(figures['ppl_ref'])}, {num_scored} tokens scored)",
            f"KL divergence     {figures['kl']:.4f} nats per token",
            f"same first choice {figures['top1']:.1%}",
            f"size              {figures['bytes'] / 2**20:.1f} MiB, {figures['bits_per_weight']:.2f} bits per weight",
        ]
    )


def model_name(path: Path) -> str:
    """What people call the model at `path`: a repository on a hub, a workspace, a folder or a file."""
    path = Path(os.path.abspath(path))
    cached = [part for part in path.parts if part.startswith("models--")]
    if cached:  # .../models--owner--name/snapshots/COMMIT
        return cached[-1].removeprefix("models--").replace("--", "/")
    return path.parent.parent.name if path.parts[-2:] == WEIGHTS.parts else path.name


def _short(perplexity: float) -> str:
    return f"{perplexity:.3f}" if perplexity < 1e6 else f"{perplexity:.1e}"


@dataclass(frozen=True)
class Run:
    """What was done. model: its name; title: of the format; command: of `lmdeploy lite`; summary: of the settings."""

    model: str
    title: str
    command: str
    summary: str


def write_report(
    folder: Path,
    figures: Mapping[str, Any],
    num_scored: int,
    run: Run,
    layers: Sequence[Mapping[str, Any]],
    answers: Sequence[tuple[str, str, str]],
) -> bool:
    """quality.json, README.md, and a plot; False where matplotlib is missing for it.

    answers: prompt, original's, quantized one's.
    """
    (folder / "quality.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    has_plot = plot_errors(layers, folder / _PLOT)
    lines = [
        f"# {run.model}, quantized: {run.title}",
        "",
        f"{run.summary[0].upper()}{run.summary[1:]}; made by `lmdeploy lite {run.command}`.",
        f"Calibrated on {figures['calib']}.",
        "",
        "```",
        format_quality(figures, num_scored),
        "```",
        "",
        "The original ran in float32, both on text that was held out of the calibration.",
        *(["", f"![relative output error of each layer]({_PLOT})"] if has_plot else []),
    ]
    for prompt, original, quantized in answers:
        lines += ["", f"**{prompt}**", "", "Original:", "", _quoted(original), "", "Quantized:", "", _quoted(quantized)]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return has_plot


def plot_errors(layers: Sequence[Mapping[str, Any]], file: Path) -> bool:
    """Draw the relative output error of every linear by layer; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    names = dict.fromkeys(name for layer in layers for name in layer)
    for name in names:
        points = [(index, max(layer[name][0], 1e-9)) for index, layer in enumerate(layers) if name in layer]
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(
        xlabel="layer",
        ylabel="squared output error, relative",
        yscale="log",
        title="Error of each layer, held-out text",
    )
    if names:
        axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
    return True


def sample_answers(path: Path, device: str) -> list[str]:
    """Greedy answers of a model to SAMPLE_PROMPTS; what went wrong in place of an answer that cannot be had."""
    from lmdeploy.api import pipeline
    from lmdeploy.messages import GenerationConfig
    from lmdeploy.pytorch_config import PytorchEngineConfig

    config = PytorchEngineConfig(session_len=512, max_batch_size=2, device_type=device)
    try:
        with pipeline(str(path), config) as pipe:
            answers = pipe(list(SAMPLE_PROMPTS), GenerationConfig(max_new_tokens=_SAMPLE_TOKENS, do_sample=False))
        assert isinstance(answers, list)
        return [answer.text if answer.finish_reason != "error" else f"({answer.error_message})" for answer in answers]
    except LMDeployError as error:
        return [f"({error})"] * len(SAMPLE_PROMPTS)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.strip().splitlines() or [""])
