"""The token windows that a model is calibrated on or judged by, from a text or by the model itself. It quantizes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lmdeploy.lite import calibration_data
from lmdeploy.lite.settings import CalibrationSettings
from lmdeploy.tokenizer import Tokenizer

Tell = Callable[[str], None]
TEXT_FILE = "calibration.txt"
_HELD_OUT_SHARE = 8  # one window in so many
_JUDGING_WINDOWS = 4  # where no text is fitted to
_SELF_LENGTH = 512


@dataclass(frozen=True)
class Windows:
    """Token ids [W, S]; the last num_held_out judge, the others are fitted to. source: where they come from, for people."""

    ids: Tensor
    num_held_out: int
    source: str

    @staticmethod
    def of(ids: Tensor, source: str, is_blind: bool) -> Windows:
        """is_blind: nothing is fitted to any text, so that all windows judge."""
        return Windows(ids, len(ids) if is_blind else max(1, len(ids) // _HELD_OUT_SHARE), source)

    @property
    def held_out(self) -> Tensor:
        """The windows that judge."""
        return self.ids[-self.num_held_out :]


def make_windows(model: Path, settings: CalibrationSettings, folder: Path, tell: Tell) -> Windows:
    """Windows as the settings ask for them. Text that the model writes is kept in `folder`. Raises ConfigError."""
    is_blind = settings.calib_samples == 0
    samples, length = settings.calib_samples or _JUDGING_WINDOWS, settings.calib_seqlen
    held_out = max(1, samples // _HELD_OUT_SHARE)
    tokenizer = Tokenizer(model)
    texts = _texts(settings.calib_dataset, is_blind, tell)
    if texts is None:
        from lmdeploy.lite.self_calibration import generate_tokens

        source, length = "text that the model wrote itself", min(length, _SELF_LENGTH)
        tell(f"the model writes its own calibration text, kept as {TEXT_FILE} beside the result")
        numbers = generate_tokens(model, tokenizer, samples * length, length, settings.device)
        ids = calibration_data.spread_windows(numbers, samples, length, held_out)
        (folder / TEXT_FILE).write_text(tokenizer.decode(numbers), encoding="utf-8")
    else:
        source = Path(settings.calib_dataset).name
        ids = calibration_data.cut_windows(texts, tokenizer, samples, length, held_out)
    source = f"{source}, {ids.shape[0]} windows of {ids.shape[1]} tokens"
    if is_blind:
        source = f"no text; judged by {source}"
    tell(f"calibrating on {source}")
    return Windows.of(ids, source, is_blind)


def _texts(source: str, is_blind: bool, tell: Tell) -> list[str] | None:
    """The texts of the data set; None where the model must write its own. Nothing is fetched only to judge by it."""
    if source == calibration_data.SELF or (is_blind and source in calibration_data.NAMED_SETS):
        return None
    try:
        return calibration_data.read_texts(source)
    except calibration_data.NotAvailable as reason:
        tell(str(reason))
        return None
