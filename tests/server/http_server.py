"""A server in a process of its own, over tiny checkpoints, for real clients."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

MAIN = "from aquiline.cli.main import main; main()"
NAME = "tiny"


@dataclass(frozen=True)
class Running:
    """``log``: what it wrote to stderr."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def metric(self, name: str) -> float:
        """The sum of its samples."""
        lines = self.get("/metrics").text.splitlines()
        found = [line for line in lines if line.split("{")[0] == f"aquiline:{name}"]
        assert found, name
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def engine_pid(self) -> int:
        """The engine's process: the server's only child that is a spawned one."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        pids = [int(pid) for file in children for pid in file.read_text().split()]
        (engine,) = [
            pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        return engine

    def wait_health(self, status: int, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if self.get("/health").status_code == status:
                    return
            except httpx.TransportError:
                assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)
        raise AssertionError(f"/health did not become {status}: {self.log.read_text()}")


@contextmanager
def serving(target: Path, draft: Path, log: Path, *flags: str) -> Iterator[Running]:
    """``aquiline serve`` in fp64, with a chain of three; ready when it is handed out."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    speculative = json.dumps({"model": str(draft), "num_speculative_tokens": 3})
    command = [
        sys.executable, "-c", MAIN, "serve", str(target), "--served-model-name", NAME, "--port",
        str(port), "--dtype", "float64", "--speculative-config", speculative, *flags,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env=environment)
    running = Running(f"http://127.0.0.1:{port}", process, log)
    try:
        running.wait_health(503)
        running.wait_health(200)
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
