"""Text to token ids and back, behind one class for every kind of vocabulary file. It knows neither models nor the engine."""

from __future__ import annotations

from lmdeploy.detokenizer import IncrementalDetokenizer
from lmdeploy.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer"]
