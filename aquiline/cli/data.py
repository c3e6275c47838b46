"""``aquiline data``: conversations for draft training, without copies and benchmark questions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from aquiline.evaluation.tasks import benchmark_texts
from aquiline.training.conversations import read_conversations, write_conversations
from aquiline.training.decontaminate import Decontaminator, decontaminate
from aquiline.training.sharegpt import load_sharegpt


def data(
    out: Annotated[Path, typer.Option(help="Conversations as JSONL, OpenAI message layout.")],
    source: Annotated[
        str, typer.Option(help="'sharegpt' (its package), or a JSONL file of conversations.")
    ] = "sharegpt",
    json_output: Annotated[bool, typer.Option("--json", help="Report as one JSON line.")] = False,
) -> None:
    """Make training data: drop exact copies and whatever touches MT-Bench, HumanEval or GSM8K."""
    found = load_sharegpt() if source == "sharegpt" else read_conversations(source)
    conversations = list(found)  # a bad line is reported before benchmarks are looked for
    kept, report = decontaminate(conversations, Decontaminator(benchmark_texts()))
    write_conversations(out, kept)
    if json_output:
        print(json.dumps(dataclasses.asdict(report) | {"out": str(out)}))
        return
    console = Console(highlight=False)
    console.print(f"{report.kept} conversations -> {out}")
    console.print(f"dropped: {report.duplicates} copies, benchmarks {dict(report.dropped)}")
    for benchmark, examples in report.examples.items():
        for example in examples:
            console.print(f"  {benchmark}: {example}", style="dim", markup=False)
