"""What the reader of configs asks of a model family. It reads none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol


class ConfigDialect(Protocol):
    """How a family's config.json departs from the usual one; every model class is a dialect.

    config_keys: the usual name of each key that the family calls otherwise. config_defaults: values of absent keys.
    """

    config_keys: ClassVar[Mapping[str, str]]
    config_defaults: ClassVar[Mapping[str, Any]]

    @classmethod
    def config_fields(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """ModelConfig fields that the family derives itself, from the config with the usual names."""
        ...
