"""What every kind of vocabulary offers. It knows no file format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path


class Vocabulary(ABC):
    """Ids of a text and the bytes of an id; adds no begin or end token by itself.

    size: one more than the largest id. special_tokens: id of each special token by its spelling. strips_first_space: the
    text begins with a space that the encoder put there. prefix_ids, suffix_ids: what the vocabulary file itself wants
    around a text.
    """

    size: int
    special_tokens: dict[str, int]
    strips_first_space: bool = False
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()

    def save(self, folder: Path) -> None:
        """Write the vocabulary into a folder, as the file that model folders keep it in; those out of GGUF files can."""
        raise NotImplementedError

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of the text alone; special tokens spelled in it become their ids."""

    @abstractmethod
    def token_to_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text; a special token's are its spelling, a hole's are empty."""

    @abstractmethod
    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, None outside it."""

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary or an added token spells it."""
