"""``aquiline train``: train a draft from a recipe or options; alone, or as a rank of torchrun."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import Progress

from aquiline.cli.dry_run import Rent, print_budget
from aquiline.cli.recipe import Recipe, configure, target_shape
from aquiline.cli.stage import bar_columns
from aquiline.core.errors import AquilineError, DataError
from aquiline.engine.loader import choose_device, choose_dtype
from aquiline.models.checkpoint import open_checkpoint
from aquiline.models.llama import load_llama
from aquiline.models.registry import resolve
from aquiline.text.tokenizer import Tokenizer, load_tokenizer
from aquiline.training.acceptance import Acceptance
from aquiline.training.budget import CARDS
from aquiline.training.checkpoint import tokens_done
from aquiline.training.config import TrainConfig
from aquiline.training.conversations import read_conversations
from aquiline.training.corpus import Corpus, build_corpus, tokenizer_fingerprint
from aquiline.training.packing import Packer
from aquiline.training.parallel import World, join
from aquiline.training.progress import Progress as Reading
from aquiline.training.report import Report
from aquiline.training.teacher import LlamaTeacher, Teacher
from aquiline.training.trainer import Trainer


def train(
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run: checkpoints, log, draft.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A Python file whose recipe() returns a TrainConfig.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Built-in name, folder or GGUF file.")] = None,
    data: Annotated[str | None, typer.Option(help="Conversations (JSONL) or a corpus.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any field of TrainConfig, as name=value.")
    ] = None,
    origin: Annotated[
        Path | None,
        typer.Option("--from", help="Start from another run's step-N folder, or from its masters."),
    ] = None,
    masters: Annotated[
        bool, typer.Option("--masters", help="Leave the fp32 weights in masters.safetensors.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run would take; no weights needed.")
    ] = False,
    card: Annotated[str, typer.Option(help=f"For --dry-run: {', '.join(CARDS)}.")] = "H100",
    gpus: Annotated[int, typer.Option(help="For --dry-run: ranks.", min=1)] = 1,
    utilisation: Annotated[
        float, typer.Option(help="For --dry-run: share of the card's peak.", min=0.01, max=1.0)
    ] = 0.4,
    price: Annotated[
        float, typer.Option(help="For --dry-run: dollars an hour and card.", min=0.0)
    ] = 2.5,
    json_output: Annotated[bool, typer.Option("--json", help="End in one JSON line.")] = False,
) -> None:
    """Train a draft by online distillation; run it again to resume."""
    loaded = None if recipe is None else Recipe.load(recipe)
    config = configure(loaded, target, data, set_ or [])
    if origin is not None:
        config = _branch(config, origin, set_ or [])
    console = Console(stderr=json_output, highlight=False)
    if dry_run:
        figures = print_budget(
            config, target_shape(config, loaded), console, Rent(card, gpus, utilisation, price)
        )
        if json_output:
            print(json.dumps(figures))
        return
    if out is None:
        raise AquilineError("--out: give the folder of the run")
    world = join(choose_device(config.device))
    try:
        run = _trainer(config, world, dtype, out)
        summary = None
        if world.rank == 0:
            summary = _watch(run, out, origin, console)
        else:
            run.run(out, lambda _: None, origin)
        if masters:
            run.save_masters(out / "masters.safetensors")
    finally:
        if world.mesh is not None:
            dist.destroy_process_group()
    if summary is not None and json_output:
        print(json.dumps(summary))


def _branch(config: TrainConfig, origin: Path, changes: list[str]) -> TrainConfig:
    """A run that starts elsewhere and decays ends with its decay, unless told how long it is."""
    if config.decay_tokens == 0 or any(change.startswith("tokens=") for change in changes):
        return config
    return dataclasses.replace(config, tokens=tokens_done(origin) + config.decay_tokens)


def _trainer(config: TrainConfig, world: World, dtype: str, out: Path) -> Trainer:
    path = resolve(config.target)
    tokenizer = load_tokenizer(path)
    shape = target_shape(config, None)
    if world.rank == 0:
        _corpus(config, out, tokenizer, shape.vocab_size)  # written by one, read by all
    world.agree(None)
    corpus = _corpus(config, out, tokenizer, shape.vocab_size)
    kind = choose_dtype(dtype, world.device)
    whole = config.shard != "full" or world.mesh is None
    device = world.device if whole else torch.device("cpu")  # shards go from there to their ranks
    teacher: Teacher
    if config.teacher == "transformers":
        from aquiline.training.transformers_teacher import TransformersTeacher

        teacher = TransformersTeacher.load(path, kind, device)
    else:
        checkpoint = open_checkpoint(path)
        longest = max(config.max_length, corpus.info.max_length) + config.eval_tokens
        window = checkpoint.config.sliding_window
        if window is not None and longest > window:
            raise AquilineError(
                f"max_length={config.max_length}: with eval_tokens={config.eval_tokens} "
                f"{checkpoint.config.context_limit}; lower it so that both are at most {window}, "
                "or give teacher=transformers"
            )
        teacher = LlamaTeacher(load_llama(checkpoint, kind, device, longest + 64))
    packer = Packer(corpus, config.tokens_per_batch, config.seed, config.holdout)
    return Trainer(config, teacher, tokenizer, packer, world)


def _watch(run: Trainer, out: Path, origin: Path | None, console: Console) -> dict[str, Any]:
    """Run with a bar and a log; what it came to."""
    config, info = run.config, run.packer.corpus
    console.print(
        f"{info.token_count:,} tokens, {info.assistant_token_count:,} of the assistant; draft of "
        f"{sum(p.numel() for p in run.student.parameters()):,} parameters on "
        f"{run.world.size} x {run.teacher.device}"
    )
    if not isinstance(run.teacher, LlamaTeacher):
        console.print("the decoder cannot run this teacher: no acceptance, the last draft is kept")
    settings = dataclasses.asdict(config)
    with Progress(*bar_columns(), console=console) as bar, Report(out, settings) as log:
        task = bar.add_task("training", total=run.schedule.steps)

        def report(reading: Reading) -> None:
            bar.update(
                task,
                completed=reading.step,
                description=f"loss {reading.loss:.4f} {reading.tokens_per_second / 1e3:.1f}k tok/s",
            )
            figures = dataclasses.asdict(reading)
            log.write(figures.pop("step"), figures)
            if reading.acceptance is not None:
                console.print(_line(reading))

        finished = run.run(out, report, origin)
    if finished.stopped:
        console.print(
            f"stopped: tokens per call fell in {config.patience} checks running while the loss fell"
        )
    best = finished.best
    if best is not None:
        console.print(f"draft -> {out / 'draft'}, of step {best[0]}, held-out TPC {best[1]:.3f}")
    return {"draft": str(out / "draft"), **run.summary(finished)}


def _line(reading: Reading) -> str:
    terms = " ".join(f"{name} {values[0]:.4f}" for name, values in reading.terms.items())

    def shown(name: str, found: Acceptance | None) -> str:
        if found is None:
            return ""
        depths = " ".join(f"{share:.3f}" for share in found.by_depth)
        return f" {name} {found.tokens_per_call:.3f} ({depths})"

    return (
        f"step {reading.step} tokens {reading.tokens / 1e6:.1f}M epoch {reading.epoch:.2f} {terms}"
        + shown("TPC", reading.acceptance)
        + shown("tree", reading.tree)
    )


def _corpus(config: TrainConfig, out: Path, tokenizer: Tokenizer, vocab: int) -> Corpus:
    """The corpus that ``data`` names, tokenised into the run's folder if it is JSONL."""
    source, ours = Path(config.data), tokenizer_fingerprint(tokenizer)
    if source.is_dir():
        corpus = Corpus.open(source, vocab)
        if corpus.info.tokenizer != ours:
            raise DataError(
                f"{source}: tokenised with another tokenizer than {config.target}'s; build it again"
            )
        return corpus
    folder = out / "corpus"
    if not folder.exists():
        build_corpus(
            tokenizer, read_conversations(source), folder, config.max_length, source=config.data
        )
    corpus = Corpus.open(folder, vocab)
    info = corpus.info
    if (info.source, info.max_length, info.tokenizer) != (config.data, config.max_length, ours):
        raise DataError(
            f"{folder}: tokenised from {info.source} with max_length={info.max_length}, or by "
            "another tokenizer; choose another --out or delete it"
        )
    return corpus
