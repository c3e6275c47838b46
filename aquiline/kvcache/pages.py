"""Pages: who owns which page of the KV cache (host side).

A page holds ``page_size`` consecutive tokens of one sequence, for every layer of target and draft.
Page 0 is a dustbin for padding rows and is never handed out. Reference counts let sequences share
pages (fork); a page returns to the free list when its last owner lets go.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable


class OutOfPages(Exception):
    """No page is free; the scheduler preempts a request or lets one wait."""


class PageAllocator:
    """The free list and the reference counts of ``count`` pages, the dustbin included."""

    def __init__(self, count: int) -> None:
        assert count >= 2, "one dustbin and one page at least"
        self.count = count
        self._free = list(range(1, count))  # sorted, so that neighbours stay neighbours
        self._owners: dict[int, int] = {}

    @property
    def free_count(self) -> int:
        return len(self._free)

    def allocate(self, after: int | None = None) -> int:
        """A free page; the neighbour of page ``after`` if possible (adjacent pages are a view)."""
        if not self._free:
            raise OutOfPages
        index = 0
        if after is not None:
            index = bisect.bisect_left(self._free, after + 1) % len(self._free)
        page = self._free.pop(index)
        self._owners[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more owner for an allocated page."""
        self._owners[page] += 1

    def free(self, page: int) -> None:
        """One owner fewer; the last one frees the page."""
        self._owners[page] -= 1
        if self._owners[page] == 0:
            del self._owners[page]
            bisect.insort(self._free, page)

    def is_shared(self, page: int) -> bool:
        return self._owners[page] > 1

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """free + owned = total, and each page has exactly the owners that ``tables`` name."""
        owners = Counter(page for table in tables for page in table)
        assert owners == Counter(self._owners), "reference counts differ from the tables"
        assert not set(self._free) & set(owners), "a page is both free and owned"
        assert sorted([*self._free, *owners]) == list(range(1, self.count)), "a page was lost"
