"""A recorded trace played to a server: TTFT and TTIT over the time of arrival, as a plot.

    python -m benchmarks.replay --out benchmarks/results/serving.json

``aquiline bench serve --trace`` plays a file of ``at``, ``prompt_tokens``, ``output_tokens`` to
``aquiline serve`` with SmolLM2 on the CPU. The trace that comes along has a request every three
seconds and, after 40 seconds, 20 within two. The plot, ``replay.png``, is put beside the file.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from aquiline.cli.options import BUILT_IN
from benchmarks import plots
from benchmarks.common import stamp, write_section
from benchmarks.served import MAIN, command_line, served

TRACE = Path("benchmarks/traces/burst.jsonl")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=None, help="the file of sections")
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--model", default=BUILT_IN)
    parser.add_argument("--speculative-config", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    options = parser.parse_args(given)
    given = sys.argv[1:] if given is None else given
    flags = ["--dtype", options.dtype, "--speculative-config", options.speculative_config,
             "--max-num-seqs", str(options.max_num_seqs), "--max-model-len", "1024",
             "--no-enable-prefix-caching"]  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        served(options.model, *flags, log=Path(folder) / "log") as server,
    ):
        out = Path(folder) / "client.json"
        client = ["bench", "serve", "--base-url", server.url, "--trace", str(options.trace),
                  "--concurrency", "1024"]  # fmt: skip
        subprocess.run([sys.executable, "-c", MAIN, *client, "--out", str(out)], check=True)
        told = json.loads(out.read_text(encoding="utf-8"))
    payload = {
        **stamp(torch.device("cpu")), "command": command_line("replay", given),
        "server": server.command, "client": shlex.join(["aquiline", *client]),
        "model": options.model, "trace": str(options.trace), "rows": told["rows"],
    }  # fmt: skip
    write_section(options.out, "replay", payload)
    if options.out is not None:
        print(plots.plot(options.out))


if __name__ == "__main__":
    main()
