"""PrefixCache: pages found again by the tokens that they were computed from (host side).

A slot i of the target depends on tokens t_0 .. t_i. Slot i of the draft holds the pair
(t_(i+1), h_i) and depends on t_0 .. t_(i+1). So what page j holds, of both, is a function of

    tokens t_0 .. t_(j * page_size)              the chain, a digest
    tokens t_(j * page_size + 1) .. t_((j + 1) * page_size)    the page's own: one a slot, each the
                                                 newest that its slot depends on

and these are the page's key; nothing else makes keys and values differ. A page whose own tokens
all match is shared. The first page that matches only in part is copied up to where it differs, or
up to where it was filled: that page is still somebody's, or will be.

Entries lie in order, so the one with the longest match is a neighbour of where the wanted tokens
would stand.
"""

from __future__ import annotations

import bisect
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aquiline.kvcache.pages import PageAllocator

Key = tuple[bytes, tuple[int, ...]]  # the chain, and the page's own tokens: fewer if it is not full


class Prefix(NamedTuple):
    """What is known of a text.

    Attributes:
        tokens: from its beginning, how many.
        pages: the full pages among them, to be shared.
        partial: the page that begins with the rest of them, to be copied; None: there is no rest.
    """

    tokens: int = 0
    pages: tuple[int, ...] = ()
    partial: int | None = None


class PrefixCache:
    """What the pages of ``allocator`` hold, of sequences that run and of those that ended."""

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        self.allocator, self.page_size = allocator, page_size
        self._sorted: list[Key] = []
        self._pages: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}

    def find(self, tokens: Sequence[int]) -> Prefix:
        """The longest known beginning of ``tokens``, the last one never included: somebody has to
        run it to know what comes next."""
        pages: list[int] = []
        for key in self._keys_of(tokens, len(tokens) - 1):
            page = self._pages.get(key) if len(key[1]) == self.page_size else None
            if page is None:
                source, count = self._longest(key)
                self.allocator.touch(source)
                known = len(pages) * self.page_size + count
                return Prefix(known, tuple(pages), source if count else None)
            pages.append(page)
        return Prefix(len(pages) * self.page_size, tuple(pages))

    def keep(self, tokens: Sequence[int], pages: Sequence[int], count: int) -> None:
        """The first ``count`` slots of ``pages`` hold what ``tokens``, one more at least, make of
        them. Their owner writes behind these slots only."""
        for key, page in zip(self._keys_of(tokens, count), pages, strict=False):
            if self._keys.get(page) == key or self._longest(key)[1] == len(key[1]):
                continue  # another page holds all of it
            if page in self._keys:
                self._forget(page)
            self._pages[key], self._keys[page] = page, key
            bisect.insort(self._sorted, key)
            self.allocator.keep(page, self._forget)

    def check_integrity(self) -> None:
        """Every entry is a page that the allocator keeps for it, and every such page an entry."""
        assert self._sorted == sorted(self._pages), "entries are out of order"
        assert self._keys == {page: key for key, page in self._pages.items()}, "two maps differ"
        assert self._keys.keys() == self.allocator._kept.keys(), "an entry without its page"

    def _keys_of(self, tokens: Sequence[int], count: int) -> Iterator[Key]:
        """Of the pages that slots 0 .. ``count`` fill, the last one perhaps in part."""
        chain = _digest(b"", tokens[:1])
        for start in range(0, count, self.page_size):
            own = tuple(tokens[start + 1 : min(start + self.page_size, count) + 1])
            yield chain, own
            chain = _digest(chain, own)

    def _longest(self, key: Key) -> tuple[int, int]:
        """The page with the same chain that shares most of the page's tokens, and how many."""
        at = bisect.bisect_left(self._sorted, key)
        found = (0, 0)
        for chain, own in self._sorted[max(at - 1, 0) : at + 1]:
            if chain == key[0]:
                count = shared(own, key[1])
                if count > found[1]:
                    found = self._pages[chain, own], count
        return found

    def _forget(self, page: int) -> None:
        key = self._keys.pop(page)
        del self._pages[key]
        del self._sorted[bisect.bisect_left(self._sorted, key)]


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _digest(chain: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.sha256(chain + array("q", tokens).tobytes()).digest()
