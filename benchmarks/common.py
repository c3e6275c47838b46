"""What every benchmark shares: the machine's fingerprint, the stamp of a result, its file.

Two tables can be set side by side only if their cards are alike, so each carries the card's copy
bandwidth and one cuBLAS point. Run benchmarks as modules from the repository's root:
``python -m benchmarks.NAME``.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
COPY_BYTES = 2**32
LINEAR = (4, 4096, 28672)  # rows, in, out: gate and up of an 8B Llama


def machine() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fingerprint(device: torch.device | None = None) -> dict[str, Any]:
    """The card: ``device`` (name), ``copy_tb_s`` (bytes read and written), ``linear_us``.

    ``linear_us`` is one bf16 product of 4 x 4096 by 4096 x 28672 through cuBLAS, replayed in a CUDA
    graph over weights that together exceed the cache. A CPU has a name alone.
    """
    device = device or machine()
    if device.type != "cuda":
        return {"device": cpu_name()}
    return {
        "device": torch.cuda.get_device_name(device),
        "copy_tb_s": round(copy_tb_s(), 3),
        "linear_us": round(linear_us(), 2),
    }


def copy_tb_s() -> float:
    """Terabytes a second of a device copy of 4 GiB; each byte counts as read and as written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)  # not in a graph: there it is the copy engine's, which is slower
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * COPY_BYTES / statistics.median(times) / 1e9


def linear_us() -> float:
    """Microseconds of the cuBLAS point; see ``fingerprint``."""
    rows, width, out = LINEAR
    weights = [
        torch.randn(out, width, device="cuda", dtype=torch.bfloat16).mul_(0.02) for _ in range(4)
    ]
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)

    def work() -> None:
        for weight in weights:
            F.linear(x, weight)

    with torch.inference_mode():
        return graph_ms(work) / len(weights) * 1e3


def graph_ms(work: Callable[[], object], repeats: int = 20) -> float:
    """Median milliseconds of ``work`` as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def stamp(device: torch.device | None = None) -> dict[str, Any]:
    """What every result carries: device, versions, commit, date."""
    device = device or machine()
    cuda = device.type == "cuda"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    try:
        versions["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        versions["triton"] = "none"
    if cuda:
        versions["cuda"] = str(torch.version.cuda)
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "versions": versions, "commit": commit(), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def commit() -> str:
    """The checkout's commit, short: AQUILINE_COMMIT where that is set, for a copy without its git;
    "unknown" without either."""
    given = os.environ.get("AQUILINE_COMMIT", "")
    if given:
        return given
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
        found = done.stdout.strip()
    except OSError:
        found = ""
    return found or "unknown"


def cpu_name() -> str:
    """The processor, with its native bf16 instructions if any."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((r.split(":")[1].strip() for r in text.splitlines() if "model name" in r), "")
    flags = (flag for flag in ("avx512_bf16", "amx_bf16") if flag in text)
    return " ".join([name or platform.machine(), *flags])


def write_result(path: Path | str | None, payload: Mapping[str, Any]) -> None:
    """Print the result as one JSON line; write it to ``path``, indented, if there is one."""
    if path is not None:
        Path(path).write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(payload))


def write_section(path: Path | None, name: str, section: Mapping[str, Any]) -> None:
    """The same for one section of a file, each with its stamp; the file's others stay."""
    old = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    write_result(path, {**old, name: section})
