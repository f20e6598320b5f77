"""The user's own chat template: a name, or the parts that differ from a named one's. It makes no template."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from lmdeploy.errors import ConfigError


@dataclass
class ChatTemplateConfig:
    """A chat template by name or by its parts; parts that are None keep the named template's text.

    A rendered conversation is
    `{system}{meta_instruction}{eosys}` `{user}{u1}{eoh}{assistant}{a1}{eoa}{separator}` `{user}{u2}{eoh}{assistant}`.
    """

    model_name: str | None = None
    model_path: str | None = None
    system: str | None = None
    meta_instruction: str | None = None
    eosys: str | None = None
    user: str | None = None
    eoh: str | None = None
    assistant: str | None = None
    eoa: str | None = None
    tool: str | None = None
    eotool: str | None = None
    separator: str | None = None
    capability: Literal["completion", "infilling", "chat", "python"] | None = None
    stop_words: list[str] | None = None

    def to_json(self, file_path: str | None = None) -> str:
        """Return the set fields as JSON, and write them to `file_path` if one is given."""
        text = json.dumps({k: v for k, v in asdict(self).items() if v is not None}, indent=2, ensure_ascii=False)
        if file_path is not None:
            Path(file_path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, file_or_string: str) -> ChatTemplateConfig:
        """Read the fields from a JSON file, or from JSON text; raises ConfigError naming an unknown field."""
        text = file_or_string
        if not text.lstrip().startswith("{"):
            try:
                text = Path(file_or_string).read_text(encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"chat template file {file_or_string!r} cannot be read: {error}") from error
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"chat template {file_or_string[:80]!r} is not JSON: {error}") from error
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known) if isinstance(values, dict) else [type(values).__name__]
        if unknown:
            raise ConfigError(f"chat template JSON has unknown fields {unknown}; known are {sorted(known)}")
        return cls(**values)
