"""Blocks are conserved, never owned and free at once, and a prefix found holds what its name says."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmdeploy.engine.block_manager import BlockManager, block_hash, root_hash

NUM_BLOCKS = 8


class Blocks(RuleBasedStateMachine):
    """Random owners take, share, name and release blocks; a plain model keeps the books."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, block_size=4)
        self.owners: list[list[int]] = []
        self.names: dict[bytes, int] = {}

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        free = self.manager.num_free
        blocks = self.manager.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            assert len(set(blocks)) == count
            self.names = {name: block for name, block in self.names.items() if block not in blocks}
            self.owners.append(blocks)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.manager.release(self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))))

    @precondition(lambda self: any(self.owners))
    @rule(data=st.data(), name=st.binary(min_size=1, max_size=1))
    def name(self, data: st.DataObject, name: bytes) -> None:
        block = data.draw(st.sampled_from([block for blocks in self.owners for block in blocks]))
        if name not in self.names and block not in self.names.values():
            self.names[name] = block
        self.manager.name(block, name)

    @rule(name=st.binary(min_size=1, max_size=1))
    def share(self, name: bytes) -> None:
        found = self.manager.find_prefix([name])
        assert found == ([self.names[name]] if name in self.names else [])
        remaining = self.manager.num_free_without(found)
        self.manager.share(found)
        assert self.manager.num_free == remaining
        self.owners.append(found)

    @invariant()
    def books_agree(self) -> None:
        owned = [block for blocks in self.owners for block in blocks]
        for block in range(NUM_BLOCKS):
            assert self.manager.references(block) == owned.count(block)
        assert self.manager.num_free == NUM_BLOCKS - len(set(owned))


Blocks.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlocks = Blocks.TestCase  # asserts in its rules and invariant


def test_hash_depends_on_everything_before() -> None:
    first, second = [1, 2, 3, 4], [5, 6, 7, 8]
    chain = block_hash(block_hash(root_hash("", 0), first), second)
    assert chain == block_hash(block_hash(root_hash("", 0), first), second)
    others = [
        block_hash(block_hash(root_hash("salt", 0), first), second),
        block_hash(block_hash(root_hash("", 7), first), second),
        block_hash(block_hash(root_hash("", 0), second), second),
        block_hash(root_hash("", 0), second),
    ]
    assert chain not in others
    assert len(set(others)) == len(others)


def test_least_recently_freed_prefix_is_evicted_first() -> None:
    manager = BlockManager(3, block_size=4)
    blocks = manager.allocate(3)
    assert blocks is not None
    for block in blocks:
        manager.name(block, bytes([block]))
    for block in blocks:
        manager.release([block])
    assert manager.allocate(1) == blocks[:1]
    assert manager.find_prefix([bytes([blocks[0]])]) == []
    assert manager.find_prefix([bytes([blocks[2]])]) == [blocks[2]]
