"""Law 6: pages are never lost, shared by accident or freed twice, and contents follow the tables.

A state machine plays a scheduler over real pages, tables and a KV plane, and a plain list of tokens
per sequence plays the truth. Each token's key in the cache is a number of its own, so a page that
two sequences both write to is seen at once.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aquiline.kernels import ops
from aquiline.kvcache.pages import OutOfPages, PageAllocator
from aquiline.kvcache.pool import KVPlane, PlaneShape
from aquiline.kvcache.table import PageTable
from aquiline.speculation.tree import TreeShape

TREE = TreeShape.of([[0], [1], [0, 0], [1, 0], [1, 0, 0]]).tables(torch.device("cpu"))


class Sequence:
    """A page table and the tokens that its pages ought to hold."""

    def __init__(self, table: PageTable, tokens: list[float]) -> None:
        self.table, self.tokens = table, tokens


class Pages(RuleBasedStateMachine):
    """append, draft and commit, rewind, fork, free: in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.sequences: list[Sequence] = []
        self.fresh = itertools.count(1)

    @initialize(pages=st.integers(2, 12), page_size=st.sampled_from([4, 2, 1]))
    def start(self, pages, page_size):
        self.allocator, self.page_size = PageAllocator(pages), page_size
        shape = PlaneShape(2, 1, 1)
        slots = pages * page_size
        self.plane = KVPlane(shape, slots, page_size, torch.float64, torch.device("cpu"))

    # ------------------------------------------------------------------------------- operations

    @rule(tokens=st.integers(0, 9))
    def begin(self, tokens):
        sequence = Sequence(PageTable(self.allocator, self.page_size), [])
        if self._reserve(sequence, tokens):
            self._write(sequence, tokens)
            self.sequences.append(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=st.integers(0, 6))
    def append(self, data, tokens):
        sequence = self._pick(data)
        if self._reserve(sequence, tokens):
            self._write(sequence, tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), leaf=st.integers(-1, TREE.shape.size - 1))
    def draft_and_commit(self, data, leaf):
        """A round: a tree behind the length, then the path to ``leaf``; -1 is no verdict."""
        sequence = self._pick(data)
        if not self._reserve(sequence, TREE.shape.size):
            return
        nodes = torch.arange(TREE.shape.size)
        keys = torch.tensor([float(next(self.fresh)) for _ in nodes], dtype=torch.float64)
        self._cache(self._slots(sequence, nodes), keys)
        if leaf < 0:
            return
        depth = TREE.shape.depths[leaf]
        path = TREE.routes[leaf]
        source = self._slots(sequence, path[1:])
        target = self._slots(sequence, torch.arange(1, TREE.shape.depth + 1))
        self.plane.commit_path(source, target)
        sequence.table.append(depth + 1)
        sequence.tokens += keys[path[: depth + 1]].tolist()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def rewind(self, data):
        """To any length, also into a page that a twin shares."""
        sequence = self._pick(data)
        length = data.draw(st.integers(0, len(sequence.tokens)))
        sequence.table.rewind(length)
        del sequence.tokens[length:]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data):
        sequence = self._pick(data)
        before = self._snapshot()
        try:
            table, copy = sequence.table.fork()
        except OutOfPages:
            assert self._snapshot() == before
            assert self.allocator.free_count == 0
            return
        if copy is not None:
            self.plane.copy_page(*copy)
        self.sequences.append(Sequence(table, list(sequence.tokens)))

    @precondition(lambda self: self._sharing())
    @rule(data=st.data(), tokens=st.integers(1, 6))
    def branch(self, data, tokens):
        """One of two twins goes back into a page they share and says something else."""
        sequence = data.draw(st.sampled_from(self._sharing()))
        shared = sum(self.allocator.is_shared(page) for page in sequence.table.pages)
        length = data.draw(st.integers(0, min(len(sequence.tokens), shared * self.page_size)))
        sequence.table.rewind(length)
        del sequence.tokens[length:]
        if self._reserve(sequence, tokens):
            self._write(sequence, tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def abort(self, data):
        sequence = self._pick(data)
        sequence.table.free()
        assert sequence.table.pages == []
        self.sequences.remove(sequence)

    # ------------------------------------------------------------------------------- invariants

    @invariant()
    def pages_add_up(self):
        tables = [sequence.table.pages for sequence in self.sequences]
        self.allocator.check_integrity(tables)
        owned = {page for pages in tables for page in pages}
        assert 0 not in owned
        assert len(owned) + self.allocator.free_count == self.allocator.count - 1

    @invariant()
    def contents_are_each_sequences_own(self):
        for sequence in self.sequences:
            table, count = sequence.table, len(sequence.tokens)
            assert table.length == count <= table.capacity
            if count:
                slots = self._slots(sequence, torch.arange(count), start=0)
                for layer in range(2):
                    keys, values = self.plane.layer(layer)
                    assert keys[slots, 0, 0].tolist() == sequence.tokens
                    assert values[slots, 0, 0].tolist() == [-token for token in sequence.tokens]

    # ------------------------------------------------------------------------------------ tools

    def _sharing(self) -> list[Sequence]:
        """The sequences that begin with a page of somebody else's, too."""
        allocator = self.allocator
        return [s for s in self.sequences if s.tokens and allocator.is_shared(s.table.pages[0])]

    def _pick(self, data) -> Sequence:
        return data.draw(st.sampled_from(self.sequences))

    def _snapshot(self):
        tables = [(list(s.table.pages), s.table.length) for s in self.sequences]
        return tables, list(self.allocator._free), dict(self.allocator._owners)

    def _reserve(self, sequence: Sequence, room: int) -> bool:
        before, own = self._snapshot(), list(sequence.table.pages)
        last, used = divmod(len(sequence.tokens), self.page_size)
        shared = bool(room and used) and self.allocator.is_shared(own[last])
        needed = max(-(-(len(sequence.tokens) + room) // self.page_size) - len(own), 0) + shared
        free = self.allocator.free_count
        try:
            copy = sequence.table.reserve(room)
        except OutOfPages:
            assert needed > free, "there was room"
            assert (self._snapshot(), sequence.table.pages) == (before, own)
            return False
        assert self.allocator.free_count == free - needed
        assert (copy is not None) == shared
        if copy is not None:
            self.plane.copy_page(*copy)
        assert sequence.table.capacity >= len(sequence.tokens) + room
        return True

    def _slots(self, sequence: Sequence, offsets, start: int | None = None):
        start = sequence.table.length if start is None else start
        table = torch.tensor([sequence.table.pages])
        return ops.slots_at(table, start + offsets[None], self.page_size)[0]

    def _cache(self, slots, keys):
        self.plane.data[:, 0, slots, 0, 0] = keys
        self.plane.data[:, 1, slots, 0, 0] = -keys

    def _write(self, sequence: Sequence, count: int) -> None:
        tokens = [float(next(self.fresh)) for _ in range(count)]
        if count:
            slots = self._slots(sequence, torch.arange(count))
            self._cache(slots, torch.tensor(tokens, dtype=torch.float64))
        sequence.table.append(count)
        sequence.tokens += tokens


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_a_twin_keeps_its_tokens_when_the_other_rewinds_into_a_shared_page():
    allocator = PageAllocator(8)
    table = PageTable(allocator, 4)
    table.reserve(4)
    table.append(4)
    twin, copy = table.fork()
    assert copy is None
    table.rewind(2)
    assert table.reserve(1) == (twin.pages[0], table.pages[0])
    assert table.pages[0] not in twin.pages, "the next token would overwrite the twin's third"
    assert table.reserve(1) is None, "now it is this sequence's own"


def test_integrity_check_sees_every_kind_of_damage():
    def damaged(damage):
        allocator = PageAllocator(6)
        table = PageTable(allocator, 2)
        table.reserve(5)
        tables = [table.pages]
        allocator.check_integrity(tables)
        damage(allocator, tables)
        with pytest.raises(AssertionError):
            allocator.check_integrity(tables)

    damaged(lambda allocator, tables: tables[0].pop())
    damaged(lambda allocator, tables: tables.append([tables[0][0]]))
    damaged(lambda allocator, tables: allocator._free.append(tables[0][0]))
    damaged(lambda allocator, tables: allocator._free.pop())
    damaged(lambda allocator, tables: allocator.free(tables[0][0]))
    damaged(lambda allocator, tables: allocator.share(tables[0][0]))
    damaged(lambda allocator, tables: allocator._free.append(0))


def test_neighbouring_pages_where_possible():
    """Adjacent pages are one view of the cache, which is what makes the CPU's prefix pass cheap."""
    allocator = PageAllocator(10)
    first, second = PageTable(allocator, 4), PageTable(allocator, 4)
    first.reserve(8)
    second.reserve(4)
    assert first.pages == [1, 2]
    first.free()
    second.reserve(12)
    assert second.pages == [3, 4, 5]


@pytest.mark.parametrize("bad", [-1, 5])
def test_commit_and_rewind_stay_inside(bad):
    table = PageTable(PageAllocator(3), 4)
    table.reserve(4)
    with pytest.raises(AssertionError):
        table.append(bad)
    table.append(3)
    with pytest.raises(AssertionError):
        table.rewind(bad)
