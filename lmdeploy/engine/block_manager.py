"""Who owns which block of the KV cache, and which full blocks can be reused as a prefix. It holds no tensor.

Blocks are reference counted. A full block is named by a hash chain over its tokens and everything before them; when
its last owner leaves, it stays findable until it is evicted, least recently freed first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256


def root_hash(*parts: object) -> bytes:
    """The hash that a chain starts from: what beside the tokens decides a block's content (salt, rotary length)."""
    return sha256(repr(parts).encode()).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The name of a full block whose predecessors are named by `parent`."""
    return sha256(parent + array("q", token_ids).tobytes()).digest()


class BlockManager:
    """Allocates blocks 0 .. num_blocks - 1; every block is owned (references > 0) or free, never both."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of_hash: dict[bytes, int] = {}
        self._hash_of_block: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks without an owner, reusable prefixes among them."""
        return len(self._free)

    def references(self, block: int) -> int:
        return self._references[block]

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold num_tokens tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, evicting the least recently freed prefixes; None, nothing taken, if too few are free."""
        if count > len(self._free):
            return None
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def find_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest cached run of `hashes`; nothing is taken yet."""
        blocks = []
        for name in hashes:
            block = self._block_of_hash.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_without(self, blocks: Sequence[int]) -> int:
        """Free blocks that would remain after `blocks` had been taken with `share`."""
        return len(self._free) - sum(1 for block in blocks if not self._references[block])

    def share(self, blocks: Sequence[int]) -> None:
        """Add an owner to blocks that find_prefix returned."""
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one owner of each block. The last blocks of a chain become the first to be evicted."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                if block not in self._hash_of_block:
                    self._free.move_to_end(block, last=False)

    def name(self, block: int, full_hash: bytes) -> None:
        """Make a full block findable; the first block of a name keeps it."""
        if full_hash not in self._block_of_hash and block not in self._hash_of_block:
            self._block_of_hash[full_hash] = block
            self._hash_of_block[block] = full_hash

    def forget_all(self) -> None:
        """No block can be reused any more (the weights have changed)."""
        self._block_of_hash.clear()
        self._hash_of_block.clear()

    def _forget(self, block: int) -> None:
        name = self._hash_of_block.pop(block, None)
        if name is not None:
            del self._block_of_hash[name]
