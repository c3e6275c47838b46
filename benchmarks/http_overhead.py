"""What HTTP costs at 8B shapes: time per token through the server's streams and without it.

    python -m benchmarks.http_overhead --tokenizer FOLDER --out benchmarks/results/serving.json

Llama-3.1-8B's shapes with random weights, an EAGLE-3 draft, a chain of 3 whose acceptance is given
(2.78 tokens a round), and the Llama-3 tokenizer (FOLDER, the ranks, or the wheel they come in: see
``llama3_tokenizer``). One server over one engine process; the same requests with the same seeds are
put to it in turns,

    engine    through AsyncLLM in the server's process, no HTTP
    http      by ``aquiline bench serve`` in a process of its own, streamed

so that rounds, batches and accepted tokens agree and what differs is HTTP. TTIT is (last - first
arrival) / (tokens - 1), a mean over the requests of a run; the ratio is the median over repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn

from aquiline.core.heap import settled_heap
from aquiline.engine.async_llm import AsyncLLM
from aquiline.engine.config import EngineConfig
from aquiline.engine.loader import LoadedModel, choose_device, chooser_of, kv_cache_tokens
from aquiline.evaluation import load, serving
from aquiline.evaluation.client import Answer
from aquiline.server import logs
from aquiline.server.app import create_app
from aquiline.server.settings import Settings
from aquiline.text.tokenizer import load_tokenizer
from benchmarks.common import ROOT, fingerprint, stamp, write_section
from benchmarks.llama3_tokenizer import read_ranks, write_tokenizer
from benchmarks.served import command_line, free_port
from benchmarks.shapes import DRAFT_VOCAB, LLAMA_31_8B, TINY, random_models, synthetic
from benchmarks.speedup_8b import SHARES

NAME = "random-8b"
CLIENT_FILE = "client.json"
GOAL, GOAL_AT = 1.05, (1, 32)
# Runs the command lines that it is given, one after another, and tells the exit code of each.
CLIENT = """
import json, sys
from aquiline.cli.main import main
for line in sys.stdin:
    sys.argv, code = json.loads(line), 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    print(f"exit {code}", flush=True)
"""


@dataclass(frozen=True)
class RandomModel:
    """A loader: 8B shapes on CUDA, elsewhere tiny ones with the tokenizer's vocabulary."""

    shares: tuple[float, ...] = SHARES

    def __call__(self, config: EngineConfig) -> LoadedModel:
        """Random weights in bf16, packed; rounds accept by coin toss."""
        device = choose_device(config.device)
        tokenizer = load_tokenizer(Path(config.model))
        chooser = chooser_of(config.speculation)
        room = 2 * max(tree.size for tree in chooser.candidates)
        assert config.max_model_len is not None
        positions = config.max_model_len + room
        if device.type == "cuda":
            models = random_models(LLAMA_31_8B, positions, DRAFT_VOCAB)
        else:
            tiny = replace(TINY, vocab_size=tokenizer.vocab_size)
            models = random_models(tiny, positions, tokenizer.vocab_size // 4, device.type)
        models.pack()
        return LoadedModel(
            models, tokenizer, chooser, room, kv_cache_tokens(config, models),
            config.max_model_len, config.prefill_budget(device.type), {}, synthetic(self.shares),
        )  # fmt: skip


class Client:
    """A process that runs command lines of ``aquiline``, so that each is not a start of Python."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout, self.process = process.stdin, process.stdout, process

    async def run(self, arguments: Sequence[str]) -> None:
        """Raises RuntimeError, with what it said, unless it exits with 0."""
        self._stdin.write((json.dumps(["aquiline", *arguments]) + "\n").encode())
        await self._stdin.drain()
        said = ""
        while line := (await self._stdout.readline()).decode():
            if line.startswith("exit "):
                if line.strip() != "exit 0":
                    break
                return
            said += line
        raise RuntimeError(f"{shlex.join(arguments)}: {said}")


@contextlib.asynccontextmanager
async def client_process(folder: Path) -> AsyncIterator[Client]:
    """A Client that works in ``folder``."""
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, cwd=folder, env={**os.environ, "PYTHONPATH": python_path},
    )  # fmt: skip
    try:
        yield Client(process)
    finally:
        process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def http_server(llm: AsyncLLM, port: int) -> AsyncIterator[None]:
    """The server over a running AsyncLLM, in this loop; the model's end is the server's."""
    app = create_app(llm, Settings((NAME,), port=port))
    config = uvicorn.Config(app, "127.0.0.1", port, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        if task.done():
            task.result()
            raise RuntimeError("the server ended at once")
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        await task


async def put_to_engine(
    llm: AsyncLLM, requests: Sequence[load.Planned], concurrency: int, options: argparse.Namespace
) -> list[Answer]:
    """What ``client.put_load`` does, without HTTP."""
    places = asyncio.Semaphore(concurrency)
    opened = time.perf_counter()

    async def one(planned: load.Planned) -> Answer:
        params = llm.default_sampling_params(
            temperature=options.temperature, max_tokens=options.max_tokens, ignore_eos=True,
            seed=planned.seed,
        )  # fmt: skip
        async with places:
            due, arrivals, tokens = time.perf_counter(), [], 0
            async for output in llm.generate(_ids(planned), params):
                for delta in output.deltas:
                    tokens += len(delta.token_ids)
                    if delta.text:
                        arrivals.append(time.perf_counter() - due)
            end = time.perf_counter() - due
            return Answer(due - opened, tuple(arrivals), end, tokens, len(_ids(planned)))

    return list(await asyncio.gather(*map(one, requests)))


def _ids(planned: load.Planned) -> tuple[int, ...]:
    assert not isinstance(planned.prompt, str)
    return planned.prompt  # type: ignore[return-value]


def client_arguments(
    concurrency: int, requests: int, options: argparse.Namespace, port: int
) -> list[str]:
    """Of ``aquiline``: what is measured, and what another server is measured with."""
    return [
        "bench", "serve", "--base-url", f"http://127.0.0.1:{port}", "--prompts", "random",
        "--prompt-tokens", str(options.prompt_tokens), "--max-tokens", str(options.max_tokens),
        "--ignore-eos", "--temperature", str(options.temperature), "--seeded", "--warm-up", "0",
        "--concurrency", str(concurrency), "--requests", str(requests), "--out", CLIENT_FILE,
    ]  # fmt: skip


def table_row(concurrency: int, pairs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians over the repeats, milliseconds; ``ratio`` of the TTIT of each pair."""
    ratios = [pair["http"]["ttit_ms"]["mean"] / pair["engine"]["ttit_ms"]["mean"] for pair in pairs]

    def median(arm: str, name: str) -> float:
        return statistics.median(pair[arm][name]["mean"] for pair in pairs)

    row: dict[str, Any] = {
        "concurrency": concurrency, "requests": pairs[0]["http"]["requests"],
        "failed": sum(pair["http"]["failed"] for pair in pairs),
        "ratio": round(statistics.median(ratios), 4), "ratios": [round(r, 4) for r in ratios],
    }  # fmt: skip
    for arm in ("engine", "http"):
        for name in ("ttit_ms", "ttft_ms"):
            row[f"{arm}_{name}"] = round(median(arm, name), 4)
        rates = [pair[arm]["tokens_per_second"] for pair in pairs]
        row[f"{arm}_tokens_per_second"] = round(statistics.median(rates), 1)
    return row


async def measured(
    llm: AsyncLLM, options: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """A row for each concurrency: engine and HTTP in turns, each first every other time."""
    port, rows = options.port or free_port(), []
    async with http_server(llm, port), client_process(folder) as client:

        async def http(size: int, count: int) -> dict[str, Any]:
            await client.run(client_arguments(size, count, options, port))
            return json.loads((folder / CLIENT_FILE).read_text(encoding="utf-8"))

        for size, count in zip(options.concurrency, options.requests, strict=True):
            requests = [
                replace(one, seed=number)
                for number, one in enumerate(load.random_prompts(count, options.prompt_tokens, 0))
            ]
            await put_to_engine(llm, requests[:size], size, options)  # graphs, pages, connections
            told = await http(size, min(size, count))
            pairs = []
            for repeat in range(options.repeats):
                pair: dict[str, Any] = {}
                for arm in ("engine", "http")[:: 1 if repeat % 2 == 0 else -1]:
                    if arm == "engine":
                        answers = await put_to_engine(llm, requests, size, options)
                        pair[arm] = serving.summary(answers)
                    else:
                        told = await http(size, count)
                        pair[arm] = told["rows"][0]
                pairs.append(pair)
            acceptance = told["rows"][0]["acceptance"] or {}
            rows.append(
                table_row(size, pairs)
                | {"tokens_per_call": acceptance.get("tokens_per_call"), "client": told["command"]}
            )
            print({k: v for k, v in rows[-1].items() if k != "client"}, flush=True)
    return rows


async def run(options: argparse.Namespace, tokenizer: Path, folder: Path) -> dict[str, Any]:
    """Load, measure, end the engine."""
    context = options.prompt_tokens + options.max_tokens + 32
    started = time.perf_counter()
    llm = AsyncLLM(
        str(tokenizer), "bfloat16",
        {"method": "eagle3", "model": "random", "num_speculative_tokens": len(SHARES)},
        loader=RandomModel(), device=options.device, max_model_len=context,
        max_num_seqs=max(options.concurrency), enable_prefix_caching=False,
        kv_cache_tokens=max(options.concurrency) * (context + 128),
    )  # fmt: skip
    async with llm:
        ready = time.perf_counter() - started
        print(f"ready after {ready:.1f} s", flush=True)
        with settled_heap():
            rows = await measured(llm, options, folder)
    return {"ready_seconds": round(ready, 1), "rows": rows}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=None, help="the file of sections")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder, ranks, or wheel")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--requests", type=int, nargs="+", default=[6, 16, 64, 128])
    # Short: 32 of them are two steps' prefill, however far apart HTTP lets them arrive.
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=256)
    # Greedy, random weights repeat one token, which may be half a character for ever.
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=0, help="0 is any free one")
    options = parser.parse_args(given)
    given = sys.argv[1:] if given is None else given
    if len(options.requests) != len(options.concurrency):
        parser.error("--requests: give one number for each of --concurrency")
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), options.tokenizer
        if not tokenizer.is_dir():
            tokenizer = folder / "tokenizer"
            tokenizer.mkdir()
            write_tokenizer(read_ranks(options.tokenizer), tokenizer)
        with (folder / "log").open("w") as log, contextlib.redirect_stderr(log):
            logs.configure()  # a line a request, as a server writes it
            loop = uvicorn.Config(lambda: None).get_loop_factory()
            try:
                with asyncio.Runner(loop_factory=loop) as runner:
                    found = runner.run(run(options, tokenizer, folder))
            except Exception:
                print((folder / "log").read_text(encoding="utf-8")[-2000:], flush=True)
                raise
    device = choose_device(options.device)
    held = {row["concurrency"]: row["ratio"] <= GOAL for row in found["rows"]}
    payload = {
        **stamp(device), "fingerprint": fingerprint(device),
        "command": command_line("http_overhead", given),
        "model": "8B shapes" if device.type == "cuda" else "tiny shapes",
        "shares": SHARES, "prompt_tokens": options.prompt_tokens,
        "max_tokens": options.max_tokens, "temperature": options.temperature,
        "repeats": options.repeats, "goal": GOAL,
        "ok": all(held[size] for size in GOAL_AT if size in held), **found,
    }  # fmt: skip
    write_section(options.out, "http_overhead", payload)


if __name__ == "__main__":
    main()
