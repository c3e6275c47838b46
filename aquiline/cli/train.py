"""``aquiline train``: train a draft from a recipe or from options."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from aquiline.core.errors import AquilineError
from aquiline.engine.loader import choose_device, choose_dtype
from aquiline.models.checkpoint import open_checkpoint
from aquiline.models.llama import load_llama
from aquiline.models.registry import resolve
from aquiline.text.tokenizer import Tokenizer, load_tokenizer
from aquiline.training import trainer as training
from aquiline.training.config import TrainConfig
from aquiline.training.conversations import read_conversations
from aquiline.training.corpus import Corpus, build_corpus, tokenizer_fingerprint
from aquiline.training.packing import Packer


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoint, log, draft.")],
    recipe: Annotated[
        Path | None, typer.Option(help="A Python file whose recipe() returns a TrainConfig.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Built-in name, folder or GGUF file.")] = None,
    data: Annotated[str | None, typer.Option(help="Conversations (JSONL) or a corpus.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any field of TrainConfig, as name=value.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="End in one JSON line.")] = False,
) -> None:
    """Train a draft by online distillation; run it again to resume."""
    config = _config(recipe, target, data, set_ or [])
    device = choose_device(config.device)
    checkpoint = open_checkpoint(resolve(config.target))
    tokenizer = load_tokenizer(checkpoint.path)
    corpus = _corpus(config, out, tokenizer, checkpoint.config.vocab_size)
    positions = max(config.max_length, corpus.info.max_length) + config.eval_tokens + 64
    model = load_llama(checkpoint, choose_dtype(dtype, device), device, positions)
    packer = Packer(corpus, config.tokens_per_batch, config.seed, config.holdout)
    run = training.Trainer(config, model, tokenizer, packer)

    console = Console(stderr=json_output, highlight=False)
    console.print(
        f"{corpus.token_count:,} tokens, {corpus.assistant_token_count:,} of the assistant; "
        f"draft of {sum(p.numel() for p in run.student.parameters()):,} parameters on {device}"
    )
    out.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar, (out / "log.jsonl").open("a") as log:
        task = bar.add_task("training", total=config.steps)

        def report(progress: training.Progress) -> None:
            bar.update(
                task,
                completed=progress.step,
                description=f"loss {progress.loss:.4f} top1 {progress.top1:.3f} "
                f"{progress.tokens_per_second / 1e3:.1f}k tok/s",
            )
            log.write(json.dumps(dataclasses.asdict(progress)) + "\n")
            if progress.acceptance is not None:
                log.flush()
                console.print(_line(progress))

        acceptance = run.run(out, report)
    summary = {
        "draft": str(out / "draft"), "tokens": config.steps * config.tokens_per_batch,
        "tokens_per_call": round(acceptance.tokens_per_call, 4),
        "accepted_by_depth": [round(share, 4) for share in acceptance.by_depth],
        "config": dataclasses.asdict(config), "torch": torch.__version__, "device": str(device),
    }  # fmt: skip
    if json_output:
        print(json.dumps(summary))
    else:
        console.print(f"draft -> {out / 'draft'}, held-out TPC {acceptance.tokens_per_call:.3f}")


def _line(progress: training.Progress) -> str:
    assert progress.acceptance is not None
    depths = " ".join(f"{share:.3f}" for share in progress.acceptance.by_depth)
    return (
        f"step {progress.step} tokens {progress.tokens / 1e6:.1f}M epoch {progress.epoch:.2f} "
        f"regression {progress.regression:.4f} ce {progress.cross_entropy:.4f} "
        f"TPC {progress.acceptance.tokens_per_call:.3f} ({depths})"
    )


def _config(
    recipe: Path | None, target: str | None, data: str | None, changes: list[str]
) -> TrainConfig:
    """The recipe's configuration, or the defaults, with the options on top."""
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    values = {} if recipe is None else dataclasses.asdict(_load_recipe(recipe))
    for name, value in (("target", target), ("data", data)):
        if value is not None:
            values[name] = value
        elif name not in values:
            raise AquilineError(f"--{name}: give it, or a --recipe")
    for change in changes:
        name, separator, text = change.partition("=")
        if name not in fields or not separator:
            raise AquilineError(f"--set {change}: give name=value with one of {sorted(fields)}")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    try:
        return TrainConfig(**values)
    except TypeError as error:
        raise AquilineError(f"--set: {error}") from None


def _load_recipe(path: Path) -> TrainConfig:
    spec = importlib.util.spec_from_file_location("recipe", path)
    if spec is None or spec.loader is None or not path.exists():
        raise AquilineError(f"--recipe {path}: no such Python file; see recipes/")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.recipe()
    except Exception as error:  # a recipe is the user's code: any error in it is theirs to see
        raise AquilineError(f"--recipe {path}: {type(error).__name__}: {error}") from None
    if not isinstance(config, TrainConfig):
        raise AquilineError(f"--recipe {path}: recipe() must return a TrainConfig")
    return config


def _corpus(config: TrainConfig, out: Path, tokenizer: Tokenizer, vocab: int) -> Corpus:
    """The corpus that ``data`` names, tokenised into the run's folder if it is JSONL."""
    source = Path(config.data)
    if source.is_dir():
        return Corpus.open(source, vocab)
    folder = out / "corpus"
    if not folder.exists():
        build_corpus(
            tokenizer, read_conversations(source), folder, config.max_length, source=config.data
        )
    corpus = Corpus.open(folder, vocab)
    ours = (config.data, config.max_length, tokenizer_fingerprint(tokenizer))
    if (corpus.info.source, corpus.info.max_length, corpus.info.tokenizer) != ours:
        raise AquilineError(
            f"{folder}: tokenised from {corpus.info.source} with max_length="
            f"{corpus.info.max_length}, or by another tokenizer; choose another --out or delete it"
        )
    return corpus
