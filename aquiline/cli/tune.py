"""``aquiline tune``: measure paths and costs on this machine and write the dispatcher's table."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aquiline.cli import options
from aquiline.core.errors import AquilineError
from aquiline.core.params import SamplingParams, SpeculationParams, VerificationRule
from aquiline.engine.config import EngineConfig
from aquiline.engine.loader import LoadedModel, load
from aquiline.evaluation.costs import PAGE_SIZE, available_bytes, measure_round_ms, pages_of
from aquiline.evaluation.paths import measure_paths, measurement_tree
from aquiline.evaluation.tasks import load_task
from aquiline.speculation.dispatch.costs import CostPoint, CostTable
from aquiline.speculation.dispatch.dispatcher import tree_pool
from aquiline.speculation.dispatch.paths import BANDS, Band, PathShares, PathTable
from aquiline.speculation.dispatch.table import DispatchTable, Provenance
from aquiline.speculation.tree import TreeShape
from aquiline.speculation.verification.rules import RULES

TEMPERATURES = (0.0, 0.6, 1.0)  # one for each band
PATH_BATCH = {"cpu": 16, "cuda": 32}  # prompts decoded together; on a card rounds are launches
CACHE_SHARE = 0.6  # of the free memory; the rest is for the round's own tensors


def tune(
    out: Annotated[Path, typer.Option(help="The table, a JSON file.")],
    model: options.Model = options.BUILT_IN,
    draft: options.Draft = None,
    prompts: Annotated[int, typer.Option(help="Prompts to decode, MT-Bench first turns.")] = 20,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Take prompts from a text file, one a line, instead.")
    ] = None,
    max_tokens: options.MaxTokens = 128,
    batches: Annotated[
        str, typer.Option(help="Batch sizes to time, comma-separated.")
    ] = "1,4,16,64",
    contexts: Annotated[str, typer.Option(help="Cached tokens a request.")] = "1024,8192",
    rules: Annotated[str, typer.Option(help="coupled, multi-round, or both.")] = "coupled",
    repeats: Annotated[int, typer.Option(help="Rounds timed at a point.")] = 20,
    dtype: options.Dtype = "auto",
    json_output: options.Json = False,
) -> None:
    """Measure which paths the target accepts and what rounds cost; write the dispatch table."""
    chosen_rules = _rules(rules)
    batch_sizes = positive_counts("--batches", batches)
    lengths = positive_counts("--contexts", contexts)
    if repeats < 1:
        raise AquilineError(f"--repeats {repeats}: give at least 1")
    if max_tokens < 2:
        raise AquilineError(f"--max-tokens {max_tokens}: give at least 2; the prefill draws one")
    if not out.parent.is_dir():
        raise AquilineError(f"--out {out}: its folder does not exist; make it first")
    texts = prompt_texts(prompts, prompts_file)
    console = Console(stderr=json_output, highlight=False, soft_wrap=True)
    plan = TunePlan(tuple(texts), tuple(chosen_rules), tuple(batch_sizes), tuple(lengths),
                    max_tokens, repeats)  # fmt: skip
    loaded = load_for_tuning(EngineConfig(model, dtype), draft, plan)  # type: ignore[arg-type]
    table = measure_table(loaded, model, draft, plan, console)
    table.save(out)
    picks = _picks(table, chosen_rules[0])
    for pick in picks:
        console.print(
            f"batch {pick.batch:>4} context {pick.context:>6} {pick.band:>6}: {pick.nodes} draft "
            f"nodes, depth {pick.depth}, {pick.rate:.3f} tokens/ms, {pick.gain:.2f}x plain"
        )
    console.print(f"table -> {out}")
    if json_output:
        print(
            json.dumps(
                {
                    "out": str(out),
                    "device": table.provenance.device,
                    "trees": len(table.trees),
                    "picks": [dataclasses.asdict(pick) for pick in picks],
                }
            )
        )


@dataclass(frozen=True)
class TunePlan:
    """What to measure.

    Attributes:
        texts: chat prompts that paths are counted on, each for ``max_tokens``.
        batches, contexts: loads that rounds are timed at; costs are those of the first rule.
        temperatures: one for each band that matters.
        capacity: tokens that the engine's page tables will have room for; None: the model's.
    """

    texts: tuple[str, ...]
    rules: tuple[VerificationRule, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    max_tokens: int
    repeats: int
    temperatures: tuple[float, ...] = TEMPERATURES
    capacity: int | None = None

    @property
    def jobs(self) -> list[tuple[VerificationRule, float]]:
        return [(rule, temperature) for rule in self.rules for temperature in self.temperatures]


def load_for_tuning(config: EngineConfig, draft: str | None, plan: TunePlan) -> LoadedModel:
    """The models, with room for the largest tree that will be measured."""
    largest = max((measurement_tree(*job) for job in plan.jobs), key=lambda tree: tree.size)
    speculation = SpeculationParams(model=draft, tree=largest.paths)
    return load(dataclasses.replace(config, speculation=speculation))


def measure_table(
    loaded: LoadedModel, model: str, draft: str | None, plan: TunePlan, console: Console
) -> DispatchTable:
    """Count paths, derive the pool from them, time its trees."""
    paths = _measure_paths(loaded, plan, console)
    pool = tuple(dict.fromkeys(tree for rule in plan.rules for tree in tree_pool(paths, rule)))
    costs = _measure_costs(loaded, pool, plan, console)
    device = loaded.models.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    origin = Provenance(
        name, model, draft or "shipped", str(loaded.models.dtype).removeprefix("torch."),
        {"torch": torch.__version__, "python": platform.python_version()},
        datetime.date.today().isoformat(),
    )  # fmt: skip
    return DispatchTable(origin, paths, costs, pool)


def _measure_paths(loaded: LoadedModel, plan: TunePlan, console: Console) -> PathTable:
    tokenizer, found = loaded.tokenizer, list[PathShares]()
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in plan.texts]
    longest, max_tokens = max(map(len, prompts)), plan.max_tokens
    if longest + max_tokens > loaded.max_model_len:
        raise AquilineError(
            f"--max-tokens {max_tokens}: with a prompt of {longest} tokens it passes the context "
            f"of {loaded.max_model_len}; lower it or shorten the prompts"
        )
    together = PATH_BATCH[loaded.models.device.type]
    with _progress(console, "paths", len(plan.jobs)) as bar:
        for rule, temperature in plan.jobs:
            shares = measure_paths(
                loaded.models, prompts, measurement_tree(rule, temperature), max_tokens,
                frozenset(tokenizer.eos_token_ids), SamplingParams(temperature=temperature), rule,
                together,
            )  # fmt: skip
            if not shares.rounds:
                raise AquilineError(
                    f"--max-tokens {max_tokens}: no round was decoded; raise it or give more "
                    "prompts"
                )
            found.append(shares)
            bar.advance(bar.task_ids[0])
            console.print(
                f"{rule} T={temperature}: {shares.rounds} rounds, "
                f"TPC {1 + sum(shares.shares.values()):.3f} of the whole measurement tree"
            )
    return PathTable(tuple(found))


def _measure_costs(
    loaded: LoadedModel, pool: tuple[TreeShape, ...], plan: TunePlan, console: Console
) -> CostTable:
    models, points = loaded.models, list[CostPoint]()
    largest = max(pool, key=lambda tree: tree.size)
    # As in an engine that chooses among the pool: state and page tables for the largest of it.
    pending = max(tree.depth for tree in pool) + 1
    capacity = plan.capacity or loaded.max_model_len + 2 * largest.size
    lengths = sorted({min(context, loaded.max_model_len) for context in plan.contexts})
    with _progress(console, "costs", len(plan.batches) * len(lengths) * len(pool)) as bar:
        for batch in plan.batches:
            for context in lengths:
                pages = pages_of(largest, batch, context)
                size = pages * PAGE_SIZE * models.bytes_per_token()
                if size > CACHE_SHARE * available_bytes(models.device):
                    console.print(
                        f"batch {batch} context {context}: left out, its cache takes "
                        f"{size / 1e9:.1f} GB"
                    )
                    bar.advance(bar.task_ids[0], len(pool))
                    continue
                planes = models.planes(pages, PAGE_SIZE)
                for tree in pool:
                    ms = measure_round_ms(
                        models, planes, tree, batch, context, RULES[plan.rules[0]],
                        repeats=plan.repeats, pending=pending, capacity=capacity,
                    )  # fmt: skip
                    points.append(CostPoint(batch, tree.size, tree.depth, batch * context, ms))
                    bar.advance(bar.task_ids[0])
                del planes
    if not points:
        raise AquilineError("--batches, --contexts: no cache fits into memory; give smaller ones")
    return CostTable(points)


def _picks(table: DispatchTable, rule: VerificationRule) -> list[Pick]:
    """The best candidate at every measured batch and context, band by band."""
    dispatcher, picks = table.dispatcher(rule), list[Pick]()
    trees = dispatcher.candidates
    plain = next(i for i, tree in enumerate(trees) if tree.size == 1)
    for batch, tokens in sorted({(p.batch, p.kv_tokens) for p in table.costs.points}):
        for band in BANDS:
            rates = [dispatcher.rate(i, batch, tokens, band) for i in range(len(trees))]
            best = max(range(len(trees)), key=rates.__getitem__)
            tree = trees[best]
            picks.append(
                Pick(
                    batch, tokens // batch, band, tree.size - 1, tree.depth, rates[best],
                    rates[best] / rates[plain],
                )
            )  # fmt: skip
    return picks


@dataclass(frozen=True)
class Pick:
    """The best candidate at one load.

    Attributes:
        nodes: draft nodes, the root not counted.
        rate: expected tokens of one request per millisecond.
        gain: that over plain decoding's.
    """

    batch: int
    context: int
    band: Band
    nodes: int
    depth: int
    rate: float
    gain: float


@contextmanager
def _progress(console: Console, what: str, total: int) -> Iterator[Progress]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        bar.add_task(what, total=total)
        yield bar


def prompt_texts(prompts: int, file: Path | None) -> list[str]:
    """MT-Bench first turns, spread over the categories, or what a file holds."""
    if file is not None:
        return options.read_prompts(None, file)
    tasks = load_task("mt-bench")
    if not 1 <= prompts <= len(tasks):
        raise AquilineError(f"--prompts {prompts}: give 1 to {len(tasks)}")
    step = len(tasks) / prompts
    return [tasks[int(index * step)].turns[0] for index in range(prompts)]


def _rules(text: str) -> list[VerificationRule]:
    known: tuple[VerificationRule, ...] = get_args(VerificationRule)
    names = text.split(",")
    if not set(names) <= set(known):
        raise AquilineError(f"--rules {text}: give some of {', '.join(known)}, comma-separated")
    return [rule for rule in known if rule in names]


def positive_counts(option: str, text: str) -> list[int]:
    """Positive integers of an option, ascending, each once."""
    try:
        counts = sorted({int(word) for word in text.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise AquilineError(f"{option} {text}: give positive integers, comma-separated")
    return counts
