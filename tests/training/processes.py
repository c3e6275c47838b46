"""Processes of a test: forked from a server that has imported the trainer once."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.tiny_run", "aquiline.cli.main"])


def start(work: Callable[..., None], *args: Any) -> ForkServerProcess:
    """``work(*args)`` in a process of its own."""
    process = CONTEXT.Process(target=work, args=args)
    process.start()
    return process


def start_ranks(size: int, work: Callable[..., None], *args: Any) -> None:
    """``work(*args)`` in ``size`` processes that find what torchrun would tell them; waits."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(_as_rank, rank, size, port, work, args) for rank in range(size)]
    for rank in ranks:
        rank.join(120)
        if rank.exitcode != 0:
            for other in ranks:
                other.kill()
            raise AssertionError(f"a rank ended with {rank.exitcode}")


def _as_rank(rank: int, size: int, port: int, work: Callable[..., None], args: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    work(*args)
