"""PageTable: the pages of one sequence and how many tokens are committed in them (host side).

    |<------------- length ------------>|<- room ->|
    [ committed tokens, one slot each   | tree     |   ]   pages * page_size slots

A round reserves room for its tree, writes the nodes there, and commits the accepted path: the
rest of the room is simply overwritten by the next round (rewind costs nothing).
"""

from __future__ import annotations

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

    def reserve(self, room: int) -> tuple[int, int] | None:
        """Own slots for ``room`` tokens beyond the length, or raise OutOfPages and change nothing.

        Returns (source page, target page) if the caller must copy a page: the next token would
        have been written into one that another sequence shares, so it was replaced.
        """
        last, used = divmod(self.length, self.page_size)
        private = not (room and used and self.allocator.is_shared(self.pages[last]))
        needed = -(-(self.length + room) // self.page_size) - len(self.pages)
        if max(needed, 0) + (not private) > self.allocator.free_count:
            raise OutOfPages
        copy = None
        if not private:
            shared = self.pages[last]
            self.pages[last] = self.allocator.allocate(shared)
            self.allocator.free(shared)
            copy = (shared, self.pages[last])
        for _ in range(needed):
            after = self.pages[-1] if self.pages else None
            self.pages.append(self.allocator.allocate(after))
        return copy

    def append(self, count: int) -> None:
        """Commit ``count`` tokens that were written into reserved room."""
        assert 0 <= count <= self.capacity - self.length, "commit beyond the reserved room"
        self.length += count

    def rewind(self, length: int) -> None:
        """Forget the tokens beyond ``length`` and free the pages past it."""
        assert 0 <= length <= self.length
        self.length = length
        keep = -(-length // self.page_size)
        while len(self.pages) > keep:
            self.allocator.free(self.pages.pop())

    def fork(self) -> tuple[PageTable, tuple[int, int] | None]:
        """A second sequence with the same tokens: full pages are shared, a partial one is new.

        Returns the new table and, if the last page is partial, (source page, target page) whose
        contents the caller copies. Raises OutOfPages and changes nothing.
        """
        twin = PageTable(self.allocator, self.page_size)
        full, partial = divmod(self.length, self.page_size)
        copy = None
        if partial:
            after = self.pages[full - 1] if full else None
            copy = (self.pages[full], self.allocator.allocate(after))
        twin.share(self, self.length)
        twin.pages += [copy[1]] if copy else []
        twin.length = self.length
        return twin, copy

    def share(self, other: PageTable, tokens: int) -> None:
        """Begin with the pages that the first ``tokens`` tokens of another sequence fill. The
        length stays 0: committing is the caller's; ``reserve`` adds this sequence's own pages."""
        assert not self.pages, "only an empty table begins with another's pages"
        self.pages = other.pages[: tokens // self.page_size]
        for page in self.pages:
            self.allocator.share(page)

    def free(self) -> None:
        """Give every page back (the request ended, was aborted or preempted)."""
        self.rewind(0)
