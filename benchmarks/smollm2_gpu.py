"""SmolLM2 with the shipped draft on MT-Bench first turns: TPC, TTIT, speed-up by batch and tree.

    python -m benchmarks.smollm2_gpu --out benchmarks/results/smollm2_gpu.json --table-out T.json

Through the engine: B prompts are one batch, timed while all of them decode (evaluation.latency).
Trees: none, a chain of 3, the best tree that branches by the dispatcher's table, and the dispatcher
itself. The table is measured first, on the same prompts, unless one is given. The limit printed
first is the target's weights and the cache read once.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from aquiline import LLM, SamplingParams
from aquiline.cli.bench import latency_row
from aquiline.cli.options import BUILT_IN
from aquiline.cli.tune import TunePlan, load_for_tuning, measure_table, prompt_texts
from aquiline.engine.config import EngineConfig
from aquiline.engine.loader import choose_device
from aquiline.evaluation.latency import Latency, measure_decoding
from aquiline.speculation.dispatch.dispatcher import Dispatcher
from aquiline.speculation.dispatch.paths import band_of
from aquiline.speculation.dispatch.table import DispatchTable
from aquiline.speculation.tree import TreeShape
from benchmarks.common import fingerprint, stamp, write_result

PROMPTS = {1: 8, 4: 16, 16: 32, 64: 64}  # by batch; others: one batch
REPEATS = {1: 2, 4: 3, 16: 6}  # by batch; others: LONG_REPEATS, since a run is a tenth of a second
LONG_REPEATS = 12
TOLERANCE = 1.02


def rich_tree(dispatcher: Dispatcher, batch: int, context: int, temperature: float) -> TreeShape:
    """The candidate that branches and promises the most tokens a millisecond."""
    band = band_of(temperature)
    branching = [i for i, tree in enumerate(dispatcher.candidates) if tree.size > tree.depth + 1]
    best = max(branching, key=lambda i: dispatcher.rate(i, batch, batch * context, band))
    return dispatcher.candidates[best]


def first_divergences(ours: Latency, plain: Latency) -> list[int | None]:
    """Of every prompt, tokens before the first that differs from plain decoding's; None: none."""
    found: list[int | None] = []
    for a, b in zip(ours.token_ids, plain.token_ids, strict=True):
        pairs = enumerate(zip(a, b, strict=False))  # windows may be of different length
        found.append(next((i for i, (x, y) in pairs if x != y), None))
    return found


class Models:
    """LLMs by tree, each loaded once."""

    def __init__(self, options: argparse.Namespace, table: str | None) -> None:
        self.options, self.table = options, table
        self.loaded: dict[object, LLM] = {}

    def of(self, tree: str | TreeShape | None) -> LLM:
        """None is plain decoding, "auto" the dispatcher."""
        if tree not in self.loaded:
            config: dict[str, Any] | None = None
            if tree is not None:
                config = {"method": "eagle"}
                config["tree"] = tree.paths if isinstance(tree, TreeShape) else tree
            if tree == "auto":
                config |= {"dispatch_table": self.table}
            o = self.options
            self.loaded[tree] = LLM(
                BUILT_IN, o.dtype, config, device=o.device, max_num_seqs=max(o.batches),
                kv_cache_tokens=o.kv_tokens, max_model_len=o.max_model_len,
                enable_prefix_caching=False,
            )  # fmt: skip
        return self.loaded[tree]


def tuned(options: argparse.Namespace) -> DispatchTable:
    """Measure a table for the engine of this benchmark."""
    started = time.perf_counter()
    plan = TunePlan(
        tuple(prompt_texts(options.tune_prompts, None)), ("coupled",), tuple(options.batches),
        tuple(options.contexts), options.tune_tokens, options.tune_repeats, (0.0, 1.0),
        options.max_model_len + 128,
    )  # fmt: skip
    config = EngineConfig(
        BUILT_IN, options.dtype, options.device, options.max_model_len, max(options.batches)
    )
    loaded = load_for_tuning(config, None, plan)
    table = measure_table(loaded, BUILT_IN, None, plan, Console(width=120))
    del loaded
    free()
    print(f"tuned in {time.perf_counter() - started:.1f} s", flush=True)
    return table


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def print_limit(llm: LLM, copy_tb_s: float, options: argparse.Namespace) -> None:
    """A plain round reads every weight but the embedding's (the head reads that) and the cache."""
    target = llm.engine.runner.models.target
    weights = sum(p.numel() for p in target.parameters()) * 2
    kv = target.plane_shape().bytes_per_token(torch.bfloat16)
    for batch in options.batches:
        size = weights + batch * options.contexts[0] * kv
        print(f"limit: plain round at batch {batch}: {size / copy_tb_s / 1e9:.3f} ms", flush=True)


def measured(llms: Sequence[LLM], prompts: Sequence[list[int]], temperature: float, batch: int,
             options: argparse.Namespace) -> list[Latency]:  # fmt: skip
    """The quickest of some runs of each; they take turns, so that a host that slows down does so
    for all, and a seed per prompt makes the runs of one say the same."""
    params = SamplingParams(temperature=temperature, max_tokens=options.tokens, seed=0)
    asked = prompts[: options.prompts or PROMPTS.get(batch, batch)]
    repeats = options.repeats or REPEATS.get(batch, LONG_REPEATS)
    turns = [[measure_decoding(llm, asked, params, batch) for llm in llms] for _ in range(repeats)]
    return [min(runs, key=lambda run: run.ttit_ms) for runs in zip(*turns, strict=True)]


def compare(row: dict[str, Any], found: Latency, plain: Latency) -> None:
    """How much of the text is plain decoding's."""
    parts = first_divergences(found, plain)
    apart = [at for at in parts if at is not None]
    row["identical"] = round((len(parts) - len(apart)) / len(parts), 3)
    row["first_divergence"] = statistics.median(apart) if apart else None


def checks(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The dispatcher against plain and chain-3 at every load."""
    by_key = {(r["batch"], r["temperature"], r["tree"]): r["ttit_ms"] for r in rows}
    found = []
    for (batch, temperature, tree), ttit in by_key.items():
        if tree == "dispatcher":
            plain, chain = (ttit / by_key[batch, temperature, name] for name in ("none", "chain-3"))
            ok = max(plain, chain) <= TOLERANCE
            found.append(
                {"batch": batch, "temperature": temperature, "ok": ok,
                 "over_plain": round(plain, 4), "over_chain_3": round(chain, 4)}
            )  # fmt: skip
            print(
                f"dispatcher {'ok' if ok else 'SLOWER by more than 2 %'}: {found[-1]}", flush=True
            )
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=None)
    parser.add_argument("--table", default=None, help="of aquiline tune; default: measure one")
    parser.add_argument("--table-out", default="dispatch_smollm2.json")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=None, help="at every batch")
    parser.add_argument("--repeats", type=int, default=None, help="at every batch")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--tune-prompts", type=int, default=64)
    parser.add_argument("--tune-tokens", type=int, default=128)
    parser.add_argument("--tune-repeats", type=int, default=6)
    parser.add_argument("--kv-tokens", type=int, default=131072)
    parser.add_argument("--max-model-len", type=int, default=2048)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = choose_device(options.device)
    options.device = device.type
    started = time.perf_counter()
    mark = fingerprint(device)
    print(mark, flush=True)
    table_path = options.table
    if table_path is None:
        table_path = options.table_out
        tuned(options).save(table_path)
    dispatcher = DispatchTable.load(table_path).dispatcher()
    models = Models(options, str(table_path))
    print_limit(models.of(None), mark.get("copy_tb_s", 0.02), options)
    texts = prompt_texts(80, None)
    encode = models.of(None).tokenizer.encode_chat
    prompts = [encode([{"role": "user", "content": text}]) for text in texts]
    rows: list[dict[str, Any]] = []
    for batch in options.batches:
        for temperature in options.temperatures:
            rich = rich_tree(dispatcher, batch, options.contexts[0], temperature)
            trees = {"none": None, "chain-3": "chain-3", "best": rich, "dispatcher": "auto"}
            llms = [models.of(tree) for tree in trees.values()]
            results = measured(llms, prompts, temperature, batch, options)
            plain = results[0]
            for (name, tree), found in zip(trees.items(), results, strict=True):
                row = latency_row(found, name, temperature, plain)
                if isinstance(tree, TreeShape):
                    row |= {"nodes": tree.size - 1, "depth": tree.depth}
                compare(row, found, plain)
                rows.append(row)
                print(f"{time.perf_counter() - started:6.1f} s  {row}", flush=True)
    write_result(
        options.out,
        {
            **stamp(device), "fingerprint": mark, "model": BUILT_IN, "dtype": options.dtype,
            "tokens": options.tokens, "table": Path(table_path).name,
            "tuned_on": "the same prompts", "dispatcher": checks(rows),
            "warm_up": dataclasses.asdict(models.of("auto").engine.warm_up), "rows": rows,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
