"""``aquiline data``: from conversations or prompts to what a draft is trained on."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from aquiline.cli import options
from aquiline.cli.answers import engine_answers
from aquiline.cli.stage import stage
from aquiline.core.errors import AquilineError, DataError
from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from aquiline.engine.loader import choose_device
from aquiline.evaluation.tasks import TASKS, benchmark_texts
from aquiline.models.checkpoint import open_checkpoint
from aquiline.models.registry import resolve
from aquiline.text.tokenizer import load_tokenizer
from aquiline.training.conversations import (
    Entry,
    Rejected,
    flaw,
    read_entries,
    write_conversations,
)
from aquiline.training.corpus import SHARD_TOKENS, build_corpus
from aquiline.training.decontaminate import Decontaminator, benchmark_file, decontaminate
from aquiline.training.deduplicate import THRESHOLD, deduplicate
from aquiline.training.regenerate import RegenerationSettings, questions, regenerate
from aquiline.training.sharegpt import load_sharegpt

Report = dict[str, Any]
BATCH = {"cpu": 16, "cuda": 256}
EXAMPLES = 5


def data(
    out: Annotated[Path, typer.Option(help="JSONL file to write; with --tokenize a folder.")],
    source: Annotated[
        str, typer.Option(help="'sharegpt' (its package), or JSONL: conversations or prompts.")
    ] = "sharegpt",
    limit: Annotated[int | None, typer.Option(help="Take the first of the source only.")] = None,
    skip_malformed: Annotated[
        bool, typer.Option("--skip-malformed", help="Count bad lines instead of stopping there.")
    ] = False,
    near: Annotated[
        float, typer.Option(help="Drop what is alike to this share; 1: exact copies only.")
    ] = THRESHOLD,
    against: Annotated[
        list[Path] | None, typer.Option(help="More benchmark files: text, .json or .jsonl.")
    ] = None,
    ngram: Annotated[int, typer.Option(help="Words shared with a benchmark that are a hit.")] = 8,
    again: Annotated[
        bool, typer.Option("--regenerate", help="Have the target say every answer anew.")
    ] = False,
    target: Annotated[
        str, typer.Option(help="Built-in name, folder or GGUF file: who answers, whose tokens.")
    ] = options.BUILT_IN,
    temperatures: Annotated[
        str, typer.Option(help="Comma-separated; each conversation is given one.")
    ] = "0,0.7,1",
    top_p: Annotated[float, typer.Option(help="Nucleus mass, in (0, 1].")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens of one answer at most.")] = 1024,
    seed: Annotated[int, typer.Option(help="Same seed, same answers.")] = 0,
    batch: Annotated[
        int | None, typer.Option(help="Answers under way at once; default: by device.")
    ] = None,
    kv_cache_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the answers' cache; default: most of the memory.")
    ] = None,
    draft: options.Draft = None,
    method: options.Method = "eagle",
    tree: options.Tree = None,
    speculate: options.Speculate = True,
    dtype: options.Dtype = "auto",
    tokenize: Annotated[
        bool, typer.Option("--tokenize", help="Write a corpus of token ids, in shards.")
    ] = False,
    max_length: Annotated[int, typer.Option(help="Tokens a conversation is cut at.")] = 2048,
    shard_tokens: Annotated[int, typer.Option(help="Tokens a shard at most.")] = SHARD_TOKENS,
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Write the report here, as JSON.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Report as one JSON line.")] = False,
) -> None:
    """Make training data: no copies, no benchmark questions; answers by the target, token ids.

    Each step leaves out what it must and says so in the report: lines of no use, exact copies and
    near-duplicates, whatever touches MT-Bench, HumanEval, GSM8K or a file given --against.
    A --regenerate run that was stopped goes on where it was when it is started again.
    """
    _require(limit is None or limit > 0, f"--limit {limit}: give a positive number")
    _require(0 < near <= 1, f"--near {near}: give a share in (0, 1]")
    _require(ngram > 0, f"--ngram {ngram}: give a positive number of words")
    _require(max_length > 0, f"--max-length {max_length}: give a positive number of tokens")
    _require(shard_tokens > 0, f"--shard-tokens {shard_tokens}: give a positive number of tokens")
    _require(
        not (tokenize and out.exists()), f"--out {out}: exists; delete it or give another folder"
    )
    SamplingParams(max_tokens=max_tokens, top_p=top_p, seed=seed)  # validated before any work
    settings = RegenerationSettings(
        target, _temperatures(temperatures), top_p, max_tokens, max_length, seed
    )
    text = out.with_name(out.name + ".jsonl") if tokenize else out
    console = Console(stderr=json_output, highlight=False)
    report: Report = {"source": source, "out": str(out)}

    entries = _read(source, limit, skip_malformed, again, report, console)
    with stage(console, "copies", len(entries)) as show:
        entries, copies = deduplicate(entries, near if near < 1 else None, lambda n: show(n, ""))
    report["duplicates"] = dataclasses.asdict(copies)
    texts, report["not_checked"] = _benchmarks(against or [])
    with stage(console, "benchmarks", len(entries)) as show:
        checker = Decontaminator(texts, ngram)
        entries, touched = decontaminate(entries, checker, lambda n: show(n, ""))
    report["decontamination"] = dataclasses.asdict(touched)
    if again:
        rows = batch or BATCH[choose_device("auto").type]
        context = open_checkpoint(resolve(target)).config.context
        config = options.speculative_config(target, draft, tree, "coupled", method)
        llm = LLM(
            target, dtype, config if speculate else None,  # type: ignore[arg-type]
            max_num_seqs=rows, max_model_len=min(max_length, context),
            kv_cache_tokens=kv_cache_tokens,
        )  # fmt: skip
        entries = _regenerate(llm, entries, settings, text, report, console)
        del llm  # its memory, before processes are forked
    report["conversations"] = len(entries)
    if not entries:
        raise DataError(
            f"{source}: of {report['read']} conversations none is left (skipped "
            f"{report['skipped']}, benchmarks {dict(touched.benchmarks)}); give other data"
        )
    conversations = [entry.conversation for entry in entries]
    if tokenize:
        tokenizer = load_tokenizer(resolve(target))
        with stage(console, "tokens", len(entries)) as show:
            info = build_corpus(
                tokenizer, conversations, out, max_length, lambda n: show(n, ""),
                source=source, shard_tokens=shard_tokens,
            )  # fmt: skip
        report["corpus"] = dataclasses.asdict(info)
    elif not again:
        write_conversations(out, conversations)
    if report_file is not None:
        report_file.parent.mkdir(parents=True, exist_ok=True)
        report_file.write_text(json.dumps(report, indent=2) + "\n")
    if json_output:
        print(json.dumps(report))
    else:
        _print(report, console)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise AquilineError(message)


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(one) for one in text.split(","))
    except ValueError:
        values = (math.nan,)
    _require(
        all(0 <= value < math.inf for value in values),
        f"--temperatures {text}: give numbers from 0, with commas between",
    )
    return values


def _read(
    source: str,
    limit: int | None,
    skip_malformed: bool,
    again: bool,
    report: Report,
    console: Console,
) -> list[Entry]:
    """The usable entries of the source; what was passed over goes into the report."""
    entries: list[Entry] = []
    skipped: Counter[str] = Counter()
    malformed: list[str] = []
    with stage(console, "reading", _line_count(source)) as show:
        for item in islice(_items(source), limit):
            show(item.number, "")
            if isinstance(item, Rejected):
                if item.malformed and not skip_malformed:
                    raise item.error(source)
                skipped["malformed" if item.malformed else item.reason] += 1
                if item.malformed and len(malformed) < EXAMPLES:
                    malformed.append(f"{item.number}: {item.reason}")
                continue
            reason = _unanswerable(item) if again else flaw(item.conversation)
            if reason is None:
                kept = questions(item.conversation) if again else item.conversation
                entries.append(Entry(item.number, kept))
            else:
                skipped[reason] += 1
    read = len(entries) + skipped.total()
    report |= {"read": read, "skipped": dict(skipped), "malformed": malformed}
    return entries


def _items(source: str) -> Iterator[Entry | Rejected]:
    if source != "sharegpt":
        return read_entries(source)
    return (Entry(number, one) for number, one in enumerate(load_sharegpt(), 1))


def _line_count(source: str) -> int | None:
    if not Path(source).is_file():
        return None
    with Path(source).open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _unanswerable(entry: Entry) -> str | None:
    roles = {turn["role"] for turn in entry.conversation}
    if "tool" in roles:
        return "results of tools, which a new answer did not ask for"
    return None if "user" in roles else "no turn of the user's to answer"


def _benchmarks(files: list[Path]) -> tuple[dict[str, list[str]], list[str]]:
    """Texts by benchmark, and why others could not be had."""
    texts = {file.name: benchmark_file(file) for file in files}
    missing = []
    for name in TASKS:
        try:
            texts |= benchmark_texts([name])
        except DataError as error:
            missing.append(f"{name}: {error}")
    return texts, missing


def _regenerate(
    llm: LLM,
    entries: list[Entry],
    settings: RegenerationSettings,
    text: Path,
    report: Report,
    console: Console,
) -> list[Entry]:
    """Answers anew; they are safe in ``text`` before the partial file goes."""
    partial = text.with_name(text.name + ".partial")
    started = time.monotonic()
    with stage(console, "answers", len(entries)) as show:

        def progress(conversations: int, tokens: int) -> None:
            rate = tokens / (time.monotonic() - started)
            show(conversations, f"{tokens:,} tokens, {rate:,.0f} a second")

        answer = engine_answers(llm, settings.max_tokens, settings.top_p)
        entries, done = regenerate(entries, answer, settings, partial, progress)
    write_conversations(text, [entry.conversation for entry in entries])
    partial.unlink()
    seconds = round(time.monotonic() - started, 1)
    report["regeneration"] = dataclasses.asdict(done) | {"seconds": seconds, "text": str(text)}
    return entries


def _print(report: Report, console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    copies, touched = report["duplicates"], report["decontamination"]
    rows = {"read": report["read"]}
    rows |= {f"- {reason}": count for reason, count in report["skipped"].items()}
    rows |= {"- exact copies": copies["exact"], "- near-duplicates": copies["near"]}
    rows |= {f"- {name}": count for name, count in touched["benchmarks"].items()}
    for part in ("regeneration", "corpus"):
        numbers = {k: v for k, v in report.get(part, {}).items() if isinstance(v, int | float)}
        rows |= {f"{part}: {name}": value for name, value in numbers.items()}
    rows["conversations"] = report["conversations"]
    for name, value in rows.items():
        table.add_row(name, f"{value:,}")
    console.print(table)
    console.print(f"-> {report['out']}", soft_wrap=True)
    for missing in report["not_checked"]:
        console.print(f"not checked: {missing}", style="yellow", markup=False, soft_wrap=True)
    for one in touched["dropped"][:EXAMPLES]:
        line = f"  {one['number']} {one['benchmark']}: {one['ngram']}"
        console.print(line, style="dim", markup=False)
    for one in copies["examples"]:
        line = f"  {one['number']} like {one['of']} ({one['likeness']}): {one['text']!r}"
        console.print(line, style="dim", markup=False)
