"""Pages: who owns which page of the KV cache (host side).

A page holds ``page_size`` consecutive tokens of one sequence, for every layer of target and draft.
Page 0 is a dustbin for padding rows and is never handed out. Reference counts let sequences share
pages. When the last owner lets go, a page returns to the free list, unless the prefix cache keeps
it: then it is idle, and is handed out when no page is free, the least recently used first.

    free --allocate--> owned --free--> free | idle        idle --share--> owned, --evict--> free
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterable


class OutOfPages(Exception):
    """No page is free; the scheduler preempts a request or lets one wait."""


class PageAllocator:
    """The free list and the reference counts of ``count`` pages, the dustbin included."""

    def __init__(self, count: int) -> None:
        assert count >= 2, "one dustbin and one page at least"
        self.count = count
        self._free = list(range(1, count))  # sorted, so that neighbours stay neighbours
        self._owners: dict[int, int] = {}
        self._kept: dict[int, Callable[[int], None]] = {}
        self._idle: dict[int, None] = {}  # least recently used first

    @property
    def free_count(self) -> int:
        """Pages that can be handed out, idle ones included."""
        return len(self._free) + len(self._idle)

    def make_room(self, count: int) -> None:
        """Have ``count`` pages in the free list; several at once stay neighbours."""
        if count > self.free_count:
            raise OutOfPages
        while len(self._free) < count:
            page = next(iter(self._idle))
            del self._idle[page]
            self._kept.pop(page)(page)
            bisect.insort(self._free, page)

    def allocate(self, after: int | None = None) -> int:
        """A free page; the neighbour of page ``after`` if possible (adjacent pages are a view)."""
        self.make_room(1)
        index = 0
        if after is not None:
            index = bisect.bisect_left(self._free, after + 1) % len(self._free)
        page = self._free.pop(index)
        self._owners[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more owner for a page that is owned or idle."""
        self._idle.pop(page, None)
        self._owners[page] = self._owners.get(page, 0) + 1

    def free(self, page: int) -> None:
        """One owner fewer; without any the page is idle if it is kept, else free."""
        self._owners[page] -= 1
        if self._owners[page] == 0:
            del self._owners[page]
            if page in self._kept:
                self._idle[page] = None
            else:
                bisect.insort(self._free, page)

    def keep(self, page: int, forget: Callable[[int], None]) -> None:
        """An owned page's contents are worth keeping; ``forget`` is called when they are lost."""
        assert page in self._owners, "only an owner knows what a page holds"
        self._kept[page] = forget

    def touch(self, page: int) -> None:
        """An idle page has been used."""
        if page in self._idle:
            del self._idle[page]
            self._idle[page] = None

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """free + owned + idle = total, each page has exactly the owners that ``tables`` name, and
        what is kept is owned or idle."""
        owners = Counter(page for table in tables for page in table)
        assert owners == Counter(self._owners), "reference counts differ from the tables"
        pages = sorted([*self._free, *owners, *self._idle])
        assert pages == list(range(1, self.count)), "a page was lost, or is in two places"
        assert self._idle.keys() <= self._kept.keys() <= {*self._idle, *owners}, (
            "a page is kept that is free, or idle and not kept"
        )
