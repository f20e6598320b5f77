"""The beginning of a prompt as a chain of digests, and which node has seen which. It knows no node's true cache."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

CHUNK_BYTES = 128
MAX_CHUNKS = 2048
NODE_CHUNKS = 1 << 16  # 8 MiB of text, about 2 million tokens
_DIGEST_BYTES = 12

Prefix = tuple[bytes, ...]


def prefix_of(body: Mapping[str, Any], salt: str) -> Prefix:
    """A digest for each whole chunk of CHUNK_BYTES; each covers all that is before it, and `salt`.

    Prompts with a common beginning have the first digests in common. salt: what keeps caches apart, as the model's name.
    """
    digest = hashlib.blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()
    text = prompt_bytes(body)
    chain = []
    for start in range(0, min(len(text) - CHUNK_BYTES + 1, MAX_CHUNKS * CHUNK_BYTES), CHUNK_BYTES):
        chunk = text[start : start + CHUNK_BYTES]
        digest = hashlib.blake2b(digest + chunk, digest_size=_DIGEST_BYTES).digest()
        chain.append(digest)
    return tuple(chain)


def prompt_bytes(body: Mapping[str, Any]) -> bytes:
    """What the model reads, in its order, as far as the digests go; of several prompts the first."""
    limit = MAX_CHUNKS * CHUNK_BYTES
    parts, size = [], 0
    for field in ("tools", "system", "instructions", "messages", "prompt", "input_ids", "input"):
        for part in _flatten(body.get(field), is_batch=field in ("prompt", "input")):
            parts.append(part)
            size += len(part)
            if size >= limit:
                return b"".join(parts)[:limit]
    return b"".join(parts)


def _flatten(value: object, *, is_batch: bool = False) -> Iterator[bytes]:
    """Every text and number inside, in order; a list of texts in a batch field is several prompts."""
    if isinstance(value, str):
        yield value.encode("utf-8", "surrogatepass")
    elif isinstance(value, list):
        if value and all(type(item) is int and 0 <= item < 1 << 31 for item in value):
            yield array("i", value).tobytes()
            return
        is_several = is_batch and value and isinstance(value[0], (str, list))
        for item in value[:1] if is_several else value:
            yield from _flatten(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name.encode("utf-8", "surrogatepass") + b"\0"
            yield from _flatten(item)
    elif value is not None:
        yield str(value).encode()


class PrefixIndex:
    """Which node was sent which beginnings, as far as it remembers: per node the `max_chunks` chunks used last."""

    def __init__(self, max_chunks: int = NODE_CHUNKS) -> None:
        self._max_chunks = max_chunks
        self._chunks: dict[str, OrderedDict[bytes, int]] = {}  # node -> chunk -> prompts with it

    def record(self, node: str, prefix: Prefix) -> None:
        """The node has been sent a prompt with this beginning."""
        chunks = self._chunks.setdefault(node, OrderedDict())
        # From the last to the first: a beginning is then always younger, and forgotten later, than what goes on from it.
        for digest in reversed(prefix):
            chunks[digest] = chunks.get(digest, 0) + 1
            chunks.move_to_end(digest)
        while len(chunks) > self._max_chunks:
            chunks.popitem(last=False)

    def match(self, node: str, prefix: Prefix) -> int:
        """How many of the first chunks the node has been sent; a binary search, as no chunk is there without those before."""
        chunks: Mapping[bytes, int] = self._chunks.get(node, {})
        low, high = 0, len(prefix)
        while low < high:
            middle = (low + high + 1) // 2
            if prefix[middle - 1] in chunks:
                low = middle
            else:
                high = middle - 1
        return low

    def count(self, node: str, digest: bytes) -> int:
        """How many prompts with this chunk the node has been sent."""
        chunks = self._chunks.get(node)
        return 0 if chunks is None else chunks.get(digest, 0)

    def size(self, node: str) -> int:
        """Chunks that are remembered of the node."""
        return len(self._chunks.get(node, ()))

    def forget(self, nodes: Sequence[str]) -> None:
        """These nodes' caches are gone."""
        for node in nodes:
            self._chunks.pop(node, None)
