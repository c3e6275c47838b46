"""Where the wall time of steady decoding goes: 8B shapes through the engine's own loop.

    python -m benchmarks.trace --out benchmarks/results/trace.json

Random weights, context 8192, chain of 3. Per batch three measurements of steady rounds: by the
clock without a profiler; the same graph replayed back to back with no engine around it; and a
profiler trace, in which a replay lasts from the start of its first kernel to the end of its last,
and kernels that overlap (dependent launch) count once. The limit is a round that is nothing but its
replay.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from aquiline.cli.options import BUILT_IN
from aquiline.core.params import SamplingParams, SpeculationParams
from aquiline.decoding.models import DecoderModels
from aquiline.engine.config import PREFILL_BUDGETS, EngineConfig
from aquiline.engine.engine import Engine
from aquiline.engine.loader import LoadedModel
from aquiline.engine.runner import bucket_of
from aquiline.models.registry import resolve
from aquiline.speculation.dispatch.dispatcher import OneTree
from aquiline.speculation.tree import TreeShape
from aquiline.speculation.verification.rules import RULES
from aquiline.text.tokenizer import Tokenizer, load_tokenizer
from benchmarks.common import fingerprint, machine, stamp, write_result
from benchmarks.shapes import models_for

CHAIN = TreeShape.chain(3)
DEVICE_WORK = {"kernel", "gpu_memcpy", "gpu_memset"}
SHOWN_GAPS = 8
IN_ROOM = 1600  # tokens a request may grow by, prefill to end


# ------------------------------------------------------------------------------------- the trace


@dataclass(frozen=True)
class Work:
    """One piece of device work, in microseconds."""

    name: str
    start: float
    end: float
    launch: int  # what launched it; all of a replay share it


@dataclass(frozen=True)
class Coverage:
    """Of the time from the first replay's start to the last one's end.

    Attributes:
        replays: share covered by graph replays.
        kernels: share covered by the union of all device work.
        gaps: the longest times between replays, [us, work before, work after].
        inner_gaps: the longest within replays.
    """

    replays: float
    kernels: float
    rounds: int
    round_ms: float
    gaps: list[tuple[float, str, str]]
    inner_gaps: list[tuple[float, str, str]]


def read_trace(path: Path) -> tuple[list[Work], set[int]]:
    """Device work of a Chrome trace, and the launches that were graph replays."""
    events = json.loads(path.read_text())["traceEvents"]
    work, graphs = [], set[int]()
    for event in events:
        launch = int(event.get("args", {}).get("correlation", -1)) if "args" in event else -1
        if event.get("cat") in DEVICE_WORK and event.get("ph") == "X":
            start = float(event["ts"])
            work.append(Work(event["name"], start, start + float(event["dur"]), launch))
        elif "GraphLaunch" in str(event.get("name")):
            graphs.add(launch)
    return sorted(work, key=lambda one: one.start), graphs


def coverage(work: Sequence[Work], graphs: set[int], skip: int = 3) -> Coverage | None:
    """Shares of the steady part; the first ``skip`` replays are left out. None: no replay seen."""
    replays: dict[int, list[Work]] = {}
    for one in work:
        if one.launch in graphs:
            replays.setdefault(one.launch, []).append(one)
    if not replays:  # a trace without launches: a replay is then many kernels with one correlation
        counts: dict[int, list[Work]] = {}
        for one in work:
            counts.setdefault(one.launch, []).append(one)
        replays = {launch: ones for launch, ones in counts.items() if len(ones) > 20}
    spans = sorted(
        (ones[0].start, max(one.end for one in ones), launch) for launch, ones in replays.items()
    )[skip:]
    if len(spans) < 2:
        return None
    start, end = spans[0][0], max(span[1] for span in spans)
    inside = [one for one in work if start <= one.start < end]
    names = {span[2]: (replays[span[2]][0].name, replays[span[2]][-1].name) for span in spans}
    busy_replays = union((a, b) for a, b, _ in spans)
    gaps = []
    for (_, before, launch), (after, _, following) in itertools.pairwise(spans):
        gaps.append((after - before, names[launch][1], names[following][0]))
    inner, last = [], None
    for one in inside:
        if last is not None and one.start > last.end and one.launch == last.launch:
            inner.append((one.start - last.end, last.name, one.name))
        if last is None or one.end > last.end:
            last = one
    starts = [span[0] for span in spans]
    lasting = [b - a for a, b in itertools.pairwise(starts)]
    return Coverage(
        busy_replays / (end - start), union((one.start, one.end) for one in inside) / (end - start),
        len(spans), statistics.median(lasting) / 1e3, longest(gaps), longest(inner),
    )  # fmt: skip


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals sorted by their start."""
    total, reached = 0.0, float("-inf")
    for start, end in intervals:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def longest(gaps: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    top = sorted(gaps, reverse=True)[:SHOWN_GAPS]
    return [(round(us, 2), before[:80], after[:80]) for us, before, after in top]


# ------------------------------------------------------------------------------------ the engine


class FoldedTokenizer:
    """A real tokenizer under random ids of another vocabulary: text costs what text costs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos_token_ids: tuple[int, ...] = ()
        self.special_token_ids: frozenset[int] = frozenset()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        size = self.tokenizer.vocab_size
        return self.tokenizer.decode([token % size for token in ids], skip_special_tokens)


def engine_of(models: DecoderModels, tokenizer: Any, batch: int, context: int) -> Engine:
    """An engine with room for ``batch`` requests that grow past ``context``."""
    room = 2 * CHAIN.size
    length = context + IN_ROOM
    config = EngineConfig(
        "random weights", max_num_seqs=batch, speculation=SpeculationParams(),
        kv_cache_tokens=batch * (length + 256), max_model_len=length,
    )  # fmt: skip
    loaded = LoadedModel(
        models, tokenizer, OneTree(CHAIN), room, None, length,
        PREFILL_BUDGETS[models.device.type], {}, RULES["coupled"],
    )  # fmt: skip
    return Engine(config, loaded)


def fill(engine: Engine, batch: int, prompt: int) -> None:
    """Prompts of random tokens, prefilled, and a few rounds more."""
    vocab = engine.runner.models.target.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(temperature=0, max_tokens=IN_ROOM, ignore_eos=True)
    ids = []
    for _ in range(batch):
        tokens = torch.randint(vocab, (prompt,), generator=generator).tolist()
        ids.append(engine.add_request(tokens, params))
    waiting = set(ids)
    while waiting:
        waiting -= {output.request_id for output in engine.step()}
    for _ in range(5):
        engine.step()


def steady_ms(engine: Engine, rounds: int) -> dict[str, float]:
    """Wall milliseconds of a step, without a profiler."""
    synchronize()
    marks = [time.perf_counter()]
    for _ in range(rounds):
        engine.step()
        marks.append(time.perf_counter())
    each = [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
    return {"median": round(statistics.median(each), 4), "mean": round(statistics.mean(each), 4),
            "longest": round(max(each), 4)}  # fmt: skip


def replay_ms(engine: Engine, rounds: int) -> float | None:
    """Milliseconds of the same graph back to back. Ends the engine's use: lengths run ahead."""
    runner = engine.runner
    if not runner.cuda:
        return None
    graph = runner._graph(bucket_of(runner.max_rows, runner.max_rows), 0)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        graph.replay()
    start.record()
    for _ in range(rounds):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / rounds


def traced(engine: Engine, rounds: int) -> Coverage | None:
    """A profiler trace of some steps."""
    cuda = engine.runner.cuda
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]):  # the first one sets the tracer up
        engine.step()
    with profile(activities=[activity]) as prof:
        for _ in range(rounds):
            engine.step()
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        work, graphs = read_trace(path)
    print(f"  {len(work)} pieces of device work, {len(graphs)} graph launches", flush=True)
    return coverage(work, graphs)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(models: DecoderModels, tokenizer: Any, batch: int, options: argparse.Namespace,
            ) -> Mapping[str, Any]:  # fmt: skip
    context = options.context
    engine = engine_of(models, tokenizer, batch, context)
    started = time.perf_counter()
    fill(engine, batch, context - 256)
    print(f"batch {batch}: filled in {time.perf_counter() - started:.1f} s", flush=True)
    wall = steady_ms(engine, options.rounds)
    print(f"  wall ms per round: {wall}", flush=True)
    seen = traced(engine, options.traced)
    lengths = [sequence.table.length for sequence in engine.scheduler.running]
    assert len(lengths) == batch, "a request ended: give it more room"
    alone = replay_ms(engine, 30)
    row: dict[str, Any] = {
        "context": context, "batch": batch, "draft": "chain-3", "rounds": options.rounds,
        "last_length": max(lengths), "wall_ms": wall,
        "replay_ms": None if alone is None else round(alone, 4),
        "replay_over_wall": None if alone is None else round(alone / wall["mean"], 4),
    }  # fmt: skip
    if seen is not None:
        row["traced"] = {
            "rounds": seen.rounds, "round_ms": round(seen.round_ms, 4),
            "replays_cover": round(seen.replays, 4), "kernels_cover": round(seen.kernels, 4),
            "gaps_us": seen.gaps, "inner_gaps_us": seen.inner_gaps,
        }  # fmt: skip
    print(f"  {row}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=None)
    parser.add_argument("--device", default=machine().type)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--traced", type=int, default=60)
    options = parser.parse_args()
    device = torch.device(options.device)
    mark = fingerprint(device)
    print(mark, flush=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    models = models_for(device.type)
    tokenizer = FoldedTokenizer(load_tokenizer(resolve(BUILT_IN)))
    rows = []
    for batch in options.batches:
        rows.append(measure(models, tokenizer, batch, options))
        gc.collect()  # the engine and its cache
        if device.type == "cuda":
            torch.cuda.empty_cache()
    covered = [row["traced"]["replays_cover"] for row in rows if "traced" in row]
    ok = len(covered) == len(rows) and min(covered) >= 0.97
    write_result(options.out, {**stamp(device), "fingerprint": mark, "ok": ok, "rows": rows})


if __name__ == "__main__":
    main()
