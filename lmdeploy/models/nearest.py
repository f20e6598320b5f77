"""Which known names come closest to one that is not, for error messages. It knows no model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str]) -> str:
    """The part of an error message that lists the nearest architectures or model types; empty if none is near."""
    families: dict[str, str] = {}
    for one in known:
        families.setdefault(_family(one), one)
    close = [families[match] for match in get_close_matches(_family(name), families, 3, 0.7)]
    return f"; the nearest that are: {', '.join(close)}" if close else ""


def _family(name: str) -> str:
    """What tells one architecture from another: qwen3moe of Qwen3MoeForCausalLM."""
    return re.sub(r"(For(CausalLM|ConditionalGeneration)|Model|LMHeadModel)$", "", name).lower()
