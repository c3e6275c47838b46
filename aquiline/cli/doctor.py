"""``aquiline doctor``: why is my acceptance low?"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aquiline.cli import options
from aquiline.cli.demo import PROMPTS
from aquiline.core.errors import AquilineError
from aquiline.core.params import MAX_CHAIN
from aquiline.engine.loader import choose_device, choose_dtype
from aquiline.evaluation.doctor import EXPECTED, EXPECTED_CHAIN, Acceptance, Examination, examine
from aquiline.layers.linear import pack_linears
from aquiline.models.checkpoint import open_checkpoint
from aquiline.models.diagnosis import diagnose
from aquiline.models.draft_export import target_shell
from aquiline.models.draft_files import DraftFiles, read_draft
from aquiline.models.finding import Engine, Finding
from aquiline.models.llama import load_llama
from aquiline.models.registry import resolve
from aquiline.text.tokenizer import load_tokenizer

ENGINES: tuple[Engine, ...] = get_args(Engine)
UNHEALTHY = 1


def doctor(
    draft: Annotated[Path, typer.Argument(help="Folder of a draft, in any layout.")],
    target: Annotated[str, typer.Option(help="The draft's target.")] = options.BUILT_IN,
    prompts: Annotated[
        int, typer.Option(help=f"Prompts to decode, up to {len(PROMPTS)}; 0 only reads the files.")
    ] = len(PROMPTS),
    max_tokens: options.MaxTokens = 64,
    chain: Annotated[int, typer.Option(help="Draft tokens a round.")] = EXPECTED_CHAIN,
    engine: Annotated[
        str, typer.Option(help=f"Whose problems count: {', '.join(ENGINES)}, comma-separated.")
    ] = "aquiline",
    dtype: options.Dtype = "auto",
    json_output: options.Json = False,
) -> None:
    """Check a draft against every known trap, measure it, and name the likely cause.

    Exit code 0: healthy for the engines asked for; 1: not.
    """
    engines = _engines(engine)
    if not 0 <= prompts <= len(PROMPTS):
        raise AquilineError(f"--prompts {prompts}: give 0 to {len(PROMPTS)}")
    if not 1 <= chain <= MAX_CHAIN:
        raise AquilineError(f"--chain {chain}: give 1 to {MAX_CHAIN}")
    if max_tokens < 2:
        raise AquilineError(f"--max-tokens {max_tokens}: the first decodes no round; give more")
    console = Console(stderr=json_output, highlight=False)
    files = read_draft(draft)
    findings = diagnose(files, target_shell(open_checkpoint(resolve(target))))
    acceptance = None
    if prompts:
        chosen = list(PROMPTS.values())[:prompts]
        acceptance = _examine(files, target, dtype, chosen, max_tokens, chain, console)
    report = Report(files.method, engines, findings, acceptance)
    report.show(console)
    if json_output:
        print(json.dumps(report.as_json()))
    if not report.healthy:
        raise typer.Exit(UNHEALTHY)


def _examine(
    files: DraftFiles, target: str, dtype: str, texts: list[str], max_tokens: int, chain: int,
    console: Console,
) -> Acceptance:  # fmt: skip
    path = resolve(target)
    tokenizer, device = load_tokenizer(path), choose_device("auto")
    encoded = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    ends = frozenset(tokenizer.eos_token_ids)
    examination = Examination(encoded, max_tokens, chain, ends)
    checkpoint = open_checkpoint(path)
    context = checkpoint.config.context
    if examination.positions > context:
        raise AquilineError(
            f"--max-tokens {max_tokens}: with the prompts it passes the target's context of "
            f"{context}; lower it"
        )
    with console.status("loading the target") as status:
        model = load_llama(checkpoint, choose_dtype(dtype, device), device, examination.positions)
        pack_linears(model)
        return examine(files, model, examination, lambda what: status.update(f"trying: {what}"))


@dataclass(frozen=True)
class Report:
    """Everything found; healthy if none of it concerns the engines asked for."""

    method: str
    engines: tuple[Engine, ...]
    findings: list[Finding]
    acceptance: Acceptance | None

    @property
    def healthy(self) -> bool:
        fails = any(set(finding.engines) & set(self.engines) for finding in self.findings)
        return not fails and (self.acceptance is None or self.acceptance.healthy)

    def show(self, console: Console) -> None:
        table = Table("check", "", "finding", "remedy", title=f"{self.method} draft")
        for finding in self.findings:
            who = ", ".join(finding.engines)
            says = f"[bold]{who}[/]: {escape(finding.says)}" if who else escape(finding.says)
            table.add_row(finding.check, self._mark(finding), says, escape(finding.remedy))
        console.print(table)
        if self.acceptance is not None:
            self._show_acceptance(console, self.acceptance)
        verdict = "[green]healthy[/]" if self.healthy else "[red]not healthy[/]"
        console.print(f"{verdict} for {', '.join(self.engines)}")

    def _mark(self, finding: Finding) -> str:
        if finding.ok:
            return "[green]ok[/]"
        asked = set(finding.engines) & set(self.engines)
        return "[red]problem[/]" if asked else "[yellow]elsewhere[/]"

    def _show_acceptance(self, console: Console, acceptance: Acceptance) -> None:
        for one in (acceptance.greedy, acceptance.sampled):
            if one is not None:
                depths = " ".join(f"{share:.2f}" for share in one.by_depth)
                console.print(
                    f"T={one.temperature:g}: {one.tokens_per_call:.2f} tokens per call, accepted "
                    f"by depth {depths} ({one.rounds} rounds)"
                )
        expected = EXPECTED["eagle3" if self.method == "eagle3" else "eagle"]
        console.print(
            f"public {self.method} drafts of 8B models: {expected} (MT-Bench, T=0, chain of 3)",
            style="dim",
        )
        for tried in acceptance.tried:
            console.print(f"  {tried.tokens_per_call:.2f} supposing: {tried.cause}", style="dim")
        for complaint in acceptance.complaints:
            console.print(f"[red]problem[/] {complaint}")
        for cause in acceptance.causes:
            console.print(
                f"[red]cause[/] it seems that {cause.cause}: undone, it accepts "
                f"{cause.tokens_per_call:.2f}. {escape(cause.remedy)}"
            )

    def as_json(self) -> dict[str, Any]:
        acceptance = self.acceptance
        measured = None
        if acceptance is not None:
            runs = [one for one in (acceptance.greedy, acceptance.sampled) if one is not None]
            measured = {
                "runs": [asdict(one) | {"tokens_per_call": one.tokens_per_call} for one in runs],
                "tried": [asdict(one) for one in acceptance.tried],
                "complaints": list(acceptance.complaints),
                "causes": [one.cause for one in acceptance.causes],
            }
        return {
            "method": self.method, "engines": self.engines, "healthy": self.healthy,
            "checks": [asdict(one) | {"ok": one.ok} for one in self.findings],
            "acceptance": measured,
        }  # fmt: skip


def _engines(text: str) -> tuple[Engine, ...]:
    names = text.split(",")
    if not set(names) <= set(ENGINES):
        raise AquilineError(f"--engine {text}: give some of {', '.join(ENGINES)}, comma-separated")
    return tuple(engine for engine in ENGINES if engine in names)
