"""Keep the garbage collector from walking a whole loaded program between two rounds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled_heap() -> Iterator[None]:
    """What exists now is left out of garbage collection until the end; what is made meanwhile is
    collected as ever. A full collection takes as long as dozens of a small model's rounds."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
