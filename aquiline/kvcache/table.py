"""PageTable: the pages of one sequence and how many tokens are committed in them (host side).

    |<------------- length ------------>|<- room ->|
    [ committed tokens, one slot each   | tree     |   ]   pages * page_size slots

A round reserves room for its tree, writes the nodes there, and commits the accepted path: the
rest of the room is simply overwritten by the next round, so rejecting a draft costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from aquiline.kvcache.pages import OutOfPages, PageAllocator


class PageTable:
    """Pages of one sequence. Invariant: ``length <= capacity``."""

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        self.allocator, self.page_size = allocator, page_size
        self.pages: list[int] = []
        self.length = 0

    @property
    def capacity(self) -> int:
        return len(self.pages) * self.page_size

    def begin(self, pages: Iterable[int]) -> None:
        """Begin with full pages that others own or the prefix cache keeps; they are committed, and
        nothing of this sequence is ever written to them."""
        assert not self.pages, "only an empty table begins with pages of others"
        for page in pages:
            self.allocator.share(page)
            self.pages.append(page)
        self.length = self.capacity

    def reserve(self, room: int) -> None:
        """Own slots for ``room`` tokens beyond the length, or raise OutOfPages and change
        nothing."""
        needed = max(-(-(self.length + room) // self.page_size) - len(self.pages), 0)
        if needed > self.allocator.free_count:
            raise OutOfPages
        self.allocator.make_room(needed)
        for _ in range(needed):
            after = self.pages[-1] if self.pages else None
            self.pages.append(self.allocator.allocate(after))

    def append(self, count: int) -> None:
        """Commit ``count`` tokens that were written into reserved room."""
        assert 0 <= count <= self.capacity - self.length, "commit beyond the reserved room"
        self.length += count

    def free(self) -> None:
        """Give every page back (the request ended, was aborted or preempted). The last page goes
        first, so that the prefix cache loses the ends of texts before their beginnings."""
        self.length = 0
        while self.pages:
            self.allocator.free(self.pages.pop())
