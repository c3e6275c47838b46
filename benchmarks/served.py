"""``aquiline serve`` as a child process, and the memory of its processes."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

MAIN = "from aquiline.cli.main import main; main()"
START_SECONDS = 300.0
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Served:
    """A server that is ready.

    Attributes:
        command: as a user would type it.
        server, engine: process ids.
    """

    url: str
    command: str
    server: int
    engine: int

    def resident_mb(self) -> dict[str, float]:
        """MiB of memory that each process holds, by ``server`` and ``engine``."""
        return {name: resident_mb(getattr(self, name)) for name in ("server", "engine")}


def resident_mb(pid: int) -> float:
    """MiB of a process's memory; Linux."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * PAGE_BYTES / 2**20


def gauge(metrics: str, name: str) -> float:
    """The sum of a metric's samples in a Prometheus text; raises LookupError if there is none."""
    found = re.findall(rf"^aquiline:{name}(?:\{{.*\}})? (\S+)$", metrics, re.MULTILINE)
    if not found:
        raise LookupError(f"{name}: not among the metrics")
    return sum(map(float, found))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def served(model: str, *flags: str, log: Path) -> Iterator[Served]:
    """Start a server and wait until it is ready; its stderr goes to ``log``. It is told to end, and
    must, when the block does.

    Raises RuntimeError, with the end of the log, if it does not get ready.
    """
    port = free_port()
    arguments = ["serve", model, *flags, "--port", str(port)]
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, "-c", MAIN, *arguments], stderr=stderr)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(url, process, log)
        command = shlex.join(["aquiline", *arguments])
        yield Served(url, command, process.pid, _engine_of(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the server did not get ready: {log.read_text()[-1000:]}")


def _engine_of(server: int) -> int:
    """The spawned child of a server."""
    files = Path(f"/proc/{server}/task").glob("*/children")
    children = [int(pid) for file in files for pid in file.read_text().split()]
    (engine,) = [
        pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return engine


def command_line(benchmark: str, arguments: Sequence[str]) -> str:
    """What to type to run a benchmark so again."""
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *arguments])
