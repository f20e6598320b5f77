"""How far one model's predictions are from another's on the same tokens: perplexity, KL divergence, top-1 agreement.

Both models run layer by layer, one layer of each in memory, in float32. It knows nothing of how either was made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.lite.layer import LayerRunner, check_finite
from lmdeploy.lite.stream import LayerStream

_ROWS = 256
_LARGEST_LOSS = 700.0  # of which there is an exponential
Progress = Callable[[], None]


@dataclass(frozen=True)
class Comparison:
    """Over all scored positions: perplexities, mean KL(original || other) in nats, share of equal first choices."""

    ppl_ref: float
    ppl: float
    kl: float
    top1: float
    num_scored: int


@torch.inference_mode()
def compare_models(
    original: Path, other: Path, windows: Tensor, device: torch.device, progress: Progress
) -> Comparison:
    """Score windows of token ids [W, S]: in each, every token but the first is predicted from those before it.

    progress is called num_steps(...) times. Raises ConfigError for models with different vocabularies,
    CheckpointError for one that gives NaN.
    """
    first, second = LayerStream(original, device), LayerStream(other, device)
    if first.config.vocab_size != second.config.vocab_size:
        raise ConfigError(
            f"the models have {first.config.vocab_size} and {second.config.vocab_size} tokens in their vocabularies; "
            "only models with one vocabulary can be compared"
        )
    hidden = [run_through(stream, windows, progress) for stream in (first, second)]
    heads = [stream.load_head() for stream in (first, second)]
    sums = torch.zeros(4, dtype=torch.float64)
    for number, window in enumerate(windows):
        for start in range(0, len(window) - 1, _ROWS):
            rows = slice(start, min(start + _ROWS, len(window) - 1))
            targets = window[rows.start + 1 : rows.stop + 1].to(device)
            logits = [head(states[number, rows]) for head, states in zip(heads, hidden, strict=True)]
            sums += _scores(logits[0], logits[1], targets)
    count = windows.shape[0] * (windows.shape[1] - 1)
    loss_ref, loss, divergence, agreeing = (sums / count).tolist()
    for path, value in ((original, loss_ref), (other, loss)):
        if not math.isfinite(value):
            raise CheckpointError(f"{path} predicts NaN or infinity: its final norm or its output head is damaged")
    ppl_ref, ppl = (math.exp(min(value, _LARGEST_LOSS)) for value in (loss_ref, loss))
    return Comparison(ppl_ref, ppl, divergence, agreeing, count)


def num_steps(num_layers: int) -> int:
    """Calls of progress in one comparison."""
    return 2 * num_layers


def run_through(stream: LayerStream, windows: Tensor, progress: Progress) -> Tensor:
    """Hidden states behind the last layer, [W, S, C] on the CPU. Raises CheckpointError, naming the layer, for NaN."""
    hidden = stream.embed(windows)
    run = LayerRunner(stream, windows.shape[1])
    for index in range(stream.num_layers):
        layer = stream.load_layer(index)
        for number in range(len(hidden)):
            hidden[number : number + 1] = run(layer, hidden[number : number + 1])
        check_finite(hidden, index)
        stream.drop_layer(index)
        progress()
    return hidden


def _scores(reference: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Sums over rows: both losses, the divergence, the equal first choices; [4] float64."""
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    losses = [-values.gather(1, targets[:, None]).sum() for values in (log_p, log_q)]
    divergence = (log_p.exp() * (log_p - log_q)).sum()
    agreeing = (reference.argmax(-1) == logits.argmax(-1)).sum()
    return torch.stack([*losses, divergence, agreeing.float()]).double().cpu()
