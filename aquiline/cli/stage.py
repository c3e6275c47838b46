"""A stage of a long command: a bar with the time left, or a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_SECONDS = 30.0
_UPDATES = 1000  # of a bar


def bar_columns() -> tuple[ProgressColumn, ...]:
    """What a bar shows: what it is about, how far it is, time gone and time left."""
    return (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip


@contextmanager
def stage(console: Console, name: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """Yields what to call with the number of things done and a note to show beside the name."""
    every = max(1, (total or 0) // _UPDATES)
    started = printed = time.monotonic()

    with Progress(
        *bar_columns(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(name, total=total)

        def show(done: int, note: str) -> None:
            nonlocal printed
            if done % every and done != total:
                return
            bar.update(task, completed=done, description=f"{name} {note}")
            now = time.monotonic()
            if not console.is_terminal and now - printed > _LINE_SECONDS:
                printed = now
                left = (now - started) * ((total or 0) - done) / max(done, 1)
                console.print(f"{name} {done}/{total} {note} {max(left, 0):.0f} s left")

        yield show
