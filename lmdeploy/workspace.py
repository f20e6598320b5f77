"""A workspace, the folder that `lmdeploy convert` writes: where its parts lie and what config.ini holds. It knows no model."""

from __future__ import annotations

import configparser
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path

from lmdeploy.errors import CheckpointError, ConfigError

WEIGHTS = Path("triton_models", "weights")
TOKENIZER = Path("triton_models", "tokenizer")
CONFIG = "config.ini"
SECTION = "llama"

Value = int | float | str


def weights_folder(path: Path) -> Path:
    """The folder of weights of a workspace that was named by its root, its triton_models, or that folder itself.

    Raises CheckpointError for a workspace of LMDeploy 0.x, whose weights are in files of another kind.
    """
    weights = next(p for p in (path / WEIGHTS, path / "weights", path) if (p / CONFIG).is_file())
    if (weights / "config.json").is_file() and any(weights.glob("*.safetensors")):
        return weights
    root = weights.parent.parent if weights.parts[-2:] == WEIGHTS.parts else weights
    if not any(weights.glob("*.weight")) and not any(weights.glob("*.qweight")):
        if weights == path:  # a folder of another kind: the loader says what it lacks
            return path
        raise CheckpointError(f"{weights} has {CONFIG} but not config.json and *.safetensors; convert the model again")
    try:
        ini = ConfigIni(weights)
        name, is_int4 = ini.text("model_name") or "MODEL_NAME", ini.text("weight_type") == "int4"
        group_size = ini.text("group_size") or "128"
    except ConfigError:
        name, is_int4, group_size = "MODEL_NAME", False, ""
    options = f" --model-format awq --group-size {group_size}" if is_int4 else ""
    raise CheckpointError(
        f"{root} was converted by LMDeploy 0.x, whose weight files this version does not read. Convert the model's "
        f"Hugging Face folder again: lmdeploy convert {name} MODEL_FOLDER{options} --dst-path {root}-new"
    )


def tokenizer_folder(weights: Path) -> Path:
    """Where the tokenizer of a folder with a config.ini lies: beside a workspace's weights, else in the folder itself."""
    beside = weights.parent / TOKENIZER.name
    return beside if beside.is_dir() else weights


def has_kv_scales(weights: Path) -> bool:
    """Whether `lite kv_qparams` has left its files there: then quant_policy 4 means what it meant in 0.1, int8."""
    return any(weights.glob("layers.*.past_kv_scale.*.weight"))


class ConfigIni:
    """The keys of a workspace's config.ini as text, with typed readers; keys that are absent or empty read as None."""

    def __init__(self, weights: Path) -> None:
        """weights: the folder that holds it. Raises ConfigError for a file that is no INI file of one section."""
        self.path = weights / CONFIG
        parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=(";", "#"))
        try:
            parser.read_string(self.path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, configparser.Error) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{self.path} cannot be read: {reason}") from error
        if len(parser.sections()) != 1:
            raise ConfigError(f"{self.path} has the sections {parser.sections()}; it needs one, [{SECTION}]")
        self.keys: Mapping[str, str] = dict(parser[parser.sections()[0]])

    def text(self, key: str) -> str | None:
        return self.keys.get(key) or None

    def number(self, key: str) -> int | float | None:
        """A number; True and False count as 1 and 0. Raises ConfigError."""
        text = self.text(key)
        if text is None:
            return None
        word = {"true": "1", "false": "0"}.get(text.lower(), text)
        try:
            return float(word) if set(word.lower()) & set(".en") else int(word)
        except ValueError:
            raise self.error(key, "give a number") from None

    def integer(self, key: str) -> int | None:
        """A whole number. Raises ConfigError."""
        value = self.number(key)
        if isinstance(value, float):
            raise self.error(key, "give a whole number")
        return value

    def like(self, key: str, value: Value) -> Value | None:
        """The key read as the type that `value` has."""
        if isinstance(value, str):
            return self.text(key)
        return self.number(key) if isinstance(value, float) else self.integer(key)

    def has_other(self, key: str, value: Value) -> bool:
        """Whether the key is there and says something else than `value`."""
        try:
            return self.like(key, value) not in (None, value)
        except ConfigError:
            return True

    def error(self, key: str, advice: str) -> ConfigError:
        """What is raised for a value that cannot be used."""
        return ConfigError(f"{self.path}: {key} = {self.keys.get(key, '')}: {advice}")

    def unknown(self, known: Iterable[str]) -> dict[str, str]:
        """Keys that are none of the known ones, each with the closest of those or ''."""
        names = list(known)
        unknown = [key for key in self.keys if key not in names]
        return {key: next(iter(difflib.get_close_matches(key, names, 1)), "") for key in unknown}


def write_config_ini(weights: Path, values: Mapping[str, Value]) -> None:
    """Write config.ini with these keys in their order."""
    lines = [f"{key} = {value}" for key, value in values.items()]
    (weights / CONFIG).write_text("\n".join((f"[{SECTION}]", *lines, "")), encoding="utf-8")
