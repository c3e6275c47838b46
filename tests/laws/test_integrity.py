"""Law 6: pages are never lost, shared by accident or freed twice, and contents follow the tables.

A state machine plays a scheduler over real pages, tables, prefix cache and two KV planes. The truth
is plain: a slot's key in the target's plane is a digest of the tokens up to it, in the draft's of
one token more, so a page that two sequences write to, or that is found by the wrong tokens, is seen
at once. Texts are of two tokens, so that beginnings meet often.
"""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aquiline.decoding.models import Planes
from aquiline.kernels import ops
from aquiline.kvcache.pages import OutOfPages, PageAllocator
from aquiline.kvcache.pool import KVPlane, PlaneShape
from aquiline.kvcache.prefix import PrefixCache
from aquiline.kvcache.table import PageTable
from aquiline.speculation.tree import TreeShape

TREE = TreeShape.of([[0], [1], [0, 0], [1, 0], [1, 0, 0]]).tables(torch.device("cpu"))
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=12)


def digest(tokens: list[int]) -> float:
    return float(int.from_bytes(hashlib.sha256(bytes(tokens)).digest()[:6]))


class Sequence:
    """A page table and the tokens that its pages ought to hold, and one more, the root. The draft
    has been fed the pairs of the first ``fed`` slots."""

    def __init__(self, table: PageTable, tokens: list[int], fed: int) -> None:
        self.table, self.tokens, self.fed = table, tokens, fed


class Pages(RuleBasedStateMachine):
    """Admit, prefill, round, leave with what is known kept or not: in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.sequences: list[Sequence] = []
        self.garbage = itertools.count(-1, -1)

    @initialize(pages=st.integers(2, 12), page_size=st.sampled_from([4, 2, 1]))
    def start(self, pages, page_size):
        self.allocator, self.page_size = PageAllocator(pages), page_size
        self.cache = PrefixCache(self.allocator, page_size)
        slots, cpu = pages * page_size, torch.device("cpu")
        target, draft = (
            KVPlane(PlaneShape(layers, 1, 1), slots, page_size, torch.float64, cpu)
            for layers in (2, 1)
        )
        self.planes = Planes(target, draft)

    # ------------------------------------------------------------------------------- operations

    @rule(text=TEXTS, more=st.integers(0, 6))
    def begin(self, text, more):
        """Admit a prompt: what is known of it is shared and copied, the rest is run."""
        prefix = self.cache.find(text)
        assert prefix.tokens <= len(text) - 1
        assert len(prefix.pages) == prefix.tokens // self.page_size
        assert (prefix.partial is None) == (prefix.tokens % self.page_size == 0)
        table = PageTable(self.allocator, self.page_size)
        table.begin(prefix.pages)
        room = len(text) - table.length + more
        if not self._reserve(table, room):
            table.free()
            return
        if prefix.partial is not None:
            self.planes.copy_page(prefix.partial, table.pages[len(prefix.pages)])
        table.append(prefix.tokens - table.length)
        sequence = Sequence(table, [*text, self._token(text)], len(text) - 1)
        self._fill(sequence, prefix.tokens, len(text), prefix.tokens, len(text) - 1)
        table.append(len(text) - prefix.tokens)
        self.sequences.append(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def learn(self, data):
        """Of a sequence that goes on, a partial page included."""
        sequence = self._pick(data)
        self.cache.keep(sequence.tokens, sequence.table.pages, sequence.fed)
        assert self.cache.find(sequence.tokens).tokens >= sequence.fed

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), leaf=st.integers(-1, TREE.shape.size - 1))
    def round(self, data, leaf):
        """The draft is fed and drafts, the target verifies, the path to ``leaf`` is committed; -1
        is a round whose verdict nobody reads."""
        sequence = self._pick(data)
        table, length = sequence.table, sequence.table.length
        if not self._reserve(table, TREE.shape.size):
            return
        self._fill(sequence, length, length, sequence.fed, length)
        nodes = torch.arange(TREE.shape.size)
        drafted = [float(next(self.garbage)) for _ in nodes[1:]]
        self._write(self.planes.draft, self._slots(table, length + nodes[:-1]), drafted)
        accepted = 0 if leaf < 0 else TREE.shape.depths[leaf]
        tokens = list(sequence.tokens)
        for _ in range(accepted + 1):
            tokens.append(self._token(tokens))
        keys = [float(next(self.garbage)) for _ in nodes]
        path = TREE.routes[max(leaf, 0)]
        for step in range(accepted + 1):
            keys[path[step]] = digest(tokens[: length + step + 1])
        self._write(self.planes.target, self._slots(table, length + nodes), keys)
        if leaf < 0:
            return
        source = self._slots(table, length + path[1:])[None]
        steps = torch.arange(1, TREE.shape.depth + 1)
        self.planes.target.commit_path(source, self._slots(table, length + steps)[None])
        table.append(accepted + 1)
        sequence.fed, sequence.tokens = length, tokens

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), kept=st.booleans())
    def leave(self, data, kept):
        """End, abort, preempt."""
        sequence = self._pick(data)
        if kept:
            self.cache.keep(sequence.tokens, sequence.table.pages, sequence.fed)
        sequence.table.free()
        assert sequence.table.pages == []
        self.sequences.remove(sequence)

    # ------------------------------------------------------------------------------- invariants

    @invariant()
    def pages_add_up(self):
        tables = [sequence.table.pages for sequence in self.sequences]
        self.allocator.check_integrity(tables)
        self.cache.check_integrity()
        owned = {page for pages in tables for page in pages}
        assert 0 not in owned
        assert len(owned) + self.allocator.free_count == self.allocator.count - 1

    @invariant()
    def contents_are_each_sequences_own(self):
        for sequence in self.sequences:
            table, tokens = sequence.table, sequence.tokens
            assert table.length == len(tokens) - 1 <= table.capacity
            self._check(self.planes.target, table, [tokens[: i + 1] for i in range(table.length)])
            self._check(self.planes.draft, table, [tokens[: i + 2] for i in range(sequence.fed)])

    # ------------------------------------------------------------------------------------ tools

    def _pick(self, data) -> Sequence:
        return data.draw(st.sampled_from(self.sequences))

    def _token(self, tokens: list[int]) -> int:
        """What the target says next: the same after the same text."""
        return int(digest(tokens)) % 2

    def _reserve(self, table: PageTable, room: int) -> bool:
        allocator = self.allocator
        before = list(table.pages), table.length, allocator.free_count, dict(allocator._owners)
        needed = max(-(-(table.length + room) // self.page_size) - len(table.pages), 0)
        try:
            table.reserve(room)
        except OutOfPages:
            assert needed > before[2], "there was room"
            after = table.pages, table.length, allocator.free_count, allocator._owners
            assert after == before
            return False
        assert allocator.free_count == before[2] - needed
        assert table.capacity >= table.length + room
        return True

    def _slots(self, table: PageTable, positions):
        pages = torch.tensor([[*table.pages, 0]])
        return ops.slots_at(pages, positions[None], self.page_size)[0]

    def _fill(self, sequence: Sequence, start: int, end: int, fed: int, pairs: int) -> None:
        """Target slots ``start`` to ``end`` and draft slots ``fed`` to ``pairs``."""
        for plane, first, last, ahead in (
            (self.planes.target, start, end, 1), (self.planes.draft, fed, pairs, 2),
        ):  # fmt: skip
            keys = [digest(sequence.tokens[: i + ahead]) for i in range(first, last)]
            slots = self._slots(sequence.table, torch.arange(first, last))
            self._write(plane, slots, keys)

    def _write(self, plane, slots, keys: list[float]) -> None:
        keys = torch.tensor(keys, dtype=torch.float64)
        plane.data[:, 0, slots, 0, 0] = keys
        plane.data[:, 1, slots, 0, 0] = -keys

    def _check(self, plane, table: PageTable, texts: list[list[int]]) -> None:
        slots = self._slots(table, torch.arange(len(texts)))
        expected = list(map(digest, texts))
        for index in range(len(plane.data)):
            keys, values = plane.layer(index)
            assert keys[slots, 0, 0].tolist() == expected
            assert values[slots, 0, 0].tolist() == [-key for key in expected]


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def kept(allocator: PageAllocator, tokens: list[int], page_size: int = 4) -> PageTable:
    """A sequence that has ended, and is known but for its last token."""
    table = PageTable(allocator, page_size)
    table.reserve(len(tokens) - 1)
    return table


def test_a_page_edge_does_not_hide_the_draft_slot_behind_it():
    """The draft's last slot of a page belongs to the token after the page: where that differs, all
    but this slot is copied."""
    allocator = PageAllocator(12)
    cache = PrefixCache(allocator, 4)
    text = list(range(9))
    table = kept(allocator, text)
    cache.keep(text, table.pages, 8)
    assert cache.find(text) == (8, tuple(table.pages), None)
    assert cache.find([*text[:8], 90]) == (7, tuple(table.pages[:1]), table.pages[1])
    assert cache.find(text[:8]) == (7, tuple(table.pages[:1]), table.pages[1])
    assert cache.find([*text[:4], 90, 91]) == (3, (), table.pages[0])
    assert cache.find([90, *text[1:]]) == (0, (), None)
    assert cache.find(text[:1]) == (0, (), None)


def test_the_same_page_after_another_beginning_is_another_page():
    allocator = PageAllocator(12)
    cache = PrefixCache(allocator, 2)
    one, other = [1, 2, 3, 4, 5], [9, 2, 3, 4, 5]
    tables = [kept(allocator, text, 2) for text in (one, other)]
    for text, table in zip((one, other), tables, strict=True):
        cache.keep(text, table.pages, 4)
    assert cache.find(one).pages == tuple(tables[0].pages)
    assert cache.find(other).pages == tuple(tables[1].pages)


def test_the_least_recently_used_goes_first_and_ends_before_beginnings():
    allocator = PageAllocator(7)
    cache = PrefixCache(allocator, 2)
    texts = [[i, 7, 7, 7, 7] for i in range(3)]
    for text in texts:
        table = kept(allocator, text, 2)
        cache.keep(text, table.pages, 4)
        table.free()
    again = PageTable(allocator, 2)
    again.begin(cache.find(texts[0]).pages)
    again.free()
    newcomer = PageTable(allocator, 2)
    for expected in ([4, 2, 4], [4, 0, 4], [4, 0, 2], [4, 0, 0], [2, 0, 0], [0, 0, 0]):
        newcomer.reserve(newcomer.capacity + 1)
        assert [cache.find(text).tokens for text in texts] == expected
        allocator.check_integrity([newcomer.pages])
        cache.check_integrity()
    with pytest.raises(OutOfPages):
        newcomer.reserve(newcomer.capacity + 1)


def test_what_another_page_holds_is_not_kept_twice():
    allocator = PageAllocator(9)
    cache = PrefixCache(allocator, 2)
    text = [1, 2, 3, 4, 5]
    tables = [kept(allocator, text, 2) for _ in range(2)]
    cache.keep(text, tables[0].pages, 4)
    cache.keep(text, tables[1].pages, 3)
    cache.keep(text, tables[1].pages, 4)
    cache.check_integrity()
    assert len(cache._pages) == 2
    assert cache.find(text).pages == tuple(tables[0].pages)


def test_integrity_check_sees_every_kind_of_damage():
    def damaged(damage):
        allocator = PageAllocator(8)
        cache = PrefixCache(allocator, 2)
        old, table = kept(allocator, [1, 2, 3], 2), PageTable(allocator, 2)
        cache.keep([1, 2, 3], old.pages, 2)
        old.free()
        table.reserve(5)
        tables = [table.pages]
        check(allocator, cache, tables)
        damage(allocator, tables)
        with pytest.raises(AssertionError):
            check(allocator, cache, tables)

    def check(allocator, cache, tables):
        allocator.check_integrity(tables)
        cache.check_integrity()

    damaged(lambda allocator, tables: tables[0].pop())
    damaged(lambda allocator, tables: tables.append([tables[0][0]]))
    damaged(lambda allocator, tables: allocator._free.append(tables[0][0]))
    damaged(lambda allocator, tables: allocator._free.pop())
    damaged(lambda allocator, tables: allocator.free(tables[0][0]))
    damaged(lambda allocator, tables: allocator.share(tables[0][0]))
    damaged(lambda allocator, tables: allocator._idle.popitem())
    damaged(lambda allocator, tables: allocator._idle.update({tables[0][0]: None}))
    damaged(lambda allocator, tables: allocator._kept.popitem())
    damaged(lambda allocator, tables: allocator.keep(tables[0][0], lambda page: None))


def test_pages_of_a_sequence_stay_neighbours():
    """Adjacent pages are one view of the cache, which is what makes the CPU's prefix pass cheap."""
    allocator = PageAllocator(10)
    cache = PrefixCache(allocator, 4)
    first, second = PageTable(allocator, 4), PageTable(allocator, 4)
    first.reserve(8)
    second.reserve(4)
    assert first.pages == [1, 2]
    first.free()
    second.reserve(12)
    assert second.pages == [3, 4, 5]
    second.free()
    old = PageTable(allocator, 4)
    old.reserve(36)
    cache.keep(list(range(37)), old.pages, 36)
    old.free()
    second.reserve(16)
    assert second.pages == [6, 7, 8, 9], "evicted together"


@pytest.mark.parametrize("bad", [-1, 5])
def test_commit_stays_inside(bad):
    table = PageTable(PageAllocator(3), 4)
    table.reserve(4)
    with pytest.raises(AssertionError):
        table.append(bad)
