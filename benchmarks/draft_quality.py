"""Which draft is best: TPC of many drafts on the same texts, and what a step of each costs.

    python -m benchmarks.draft_quality runs/*/draft --out benchmarks/results/draft_quality.json

The target answers MT-Bench, HumanEval and GSM8K once for each temperature, without a draft; every
draft is then scored on these texts in teacher-forced passes (evaluation.paired), and the one that
promises the most speed is confirmed by decoding MT-Bench with it. A draft's ``tokens``,
``objective``, ``epochs`` and ``name`` are read from a summary.json in its folder or the folder
above; what is not told stays null. Predicted speed-up: TPC times a plain round's time over that of
a round with the draft, at batch 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aquiline import LLM, SamplingParams
from aquiline.cli.options import BUILT_IN
from aquiline.decoding.models import DecoderModels, Drafter
from aquiline.engine.loader import choose_device
from aquiline.evaluation.costs import measure_round_ms, pages_of
from aquiline.evaluation.loops import inside_loops, loop_share
from aquiline.evaluation.paired import token_ranks
from aquiline.evaluation.tasks import load_task
from aquiline.evaluation.texts import OVERRUN, FixedText, answer, stored_texts
from aquiline.evaluation.walk import paired_acceptance
from aquiline.models.draft import EagleDraft
from aquiline.models.draft_checkpoint import load_draft
from aquiline.models.llama import Llama
from aquiline.models.registry import shipped_draft
from aquiline.speculation.tree import TreeShape
from benchmarks.common import fingerprint, stamp, write_result

TASKS = ("mt-bench", "humaneval", "gsm8k")
SUMMARY = "summary.json"
TOLD = ("tokens", "objective", "epochs")
Row = dict[str, Any]
TextsOf = Mapping[tuple[str, float], Sequence[FixedText]]  # by task and temperature


@dataclass(frozen=True)
class Candidate:
    """A draft folder and what is told about it."""

    folder: Path
    name: str
    told: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Candidate:
        """Called by its own folder, or the run's if that is just "draft"."""
        files = [place / SUMMARY for place in (folder, folder.parent)]
        file = next((file for file in files if file.is_file()), None)
        summary = {} if file is None else json.loads(file.read_text())
        name = folder.resolve().parent.name if folder.name == "draft" else folder.name
        return cls(folder, summary.get("name", name), {key: summary.get(key) for key in TOLD})


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -------------------------------------------------------------------------------------- the texts


def all_texts(llm: LLM, options: argparse.Namespace) -> dict[tuple[str, float], list[FixedText]]:
    """Every task at every temperature, from the file where there is one."""
    found = {}
    for task in options.tasks:
        prompts = load_task(task)[: options.limit]
        for temperature in options.temperatures:
            facts = {
                "model": options.model, "dtype": options.dtype, "task": task,
                "temperature": temperature, "max_tokens": options.tokens, "prompts": len(prompts),
                "overrun": OVERRUN,
            }  # fmt: skip
            started = time.perf_counter()
            found[task, temperature] = stored_texts(
                options.texts / f"{task}-t{temperature:g}.json",
                facts,
                lambda p=prompts, t=temperature: answer(llm, p, t, options.tokens),
            )
            length = sum(text.length for text in found[task, temperature])
            seconds = time.perf_counter() - started
            print(f"{task} T={temperature:g}: {length} tokens in {seconds:.1f} s", flush=True)
    return found


# ------------------------------------------------------------------------------------- the drafts


@dataclass(frozen=True)
class Costs:
    """Milliseconds at batch 1: a plain round, a round with a chain by its length."""

    plain_ms: float
    round_ms: Mapping[int, float]

    @property
    def step_ms(self) -> float:
        """Of one more draft step; its node is verified in the same pass as the others."""
        shortest, longest = min(self.round_ms), max(self.round_ms)
        steps = max(1, longest - shortest)
        return (self.round_ms[longest] - self.round_ms[shortest]) / steps


def round_ms(models: DecoderModels, chain: int, options: argparse.Namespace) -> float:
    """Median of one round with a chain (0: plain) at ``options.context`` cached tokens."""
    tree = TreeShape.chain(chain)
    planes = models.planes(pages_of(tree, 1, options.context), 128)
    return measure_round_ms(models, planes, tree, 1, options.context, repeats=options.repeats)


def costs_of(models: DecoderModels, plain_ms: float, options: argparse.Namespace) -> Costs:
    chains = {chain: round_ms(models, chain, options) for chain in options.chains}
    free()
    return Costs(plain_ms, chains)


def draft_rows(
    candidate: Candidate, models: DecoderModels, costs: Costs, texts: TextsOf,
    options: argparse.Namespace,
) -> Iterator[Row]:  # fmt: skip
    """A row for each task, temperature and chain."""
    assert models.drafter is not None
    draft = models.drafter.draft
    described = {
        "draft": candidate.name, "layers": draft.config.num_layers, **candidate.told,
        "parameters": sum(p.numel() for p in draft.parameters()),
    }  # fmt: skip
    for (task, temperature), answers in texts.items():
        inside = [inside_loops(text.tokens[: text.length]) for text in answers]
        outside = [~one for one in inside]
        ranks = token_ranks(models, answers, temperature, max(options.chains), width=1)
        for chain in options.chains:
            accepted = acceptance_fields(ranks, chain, outside)
            yield {
                **described, "task": task, "temperature": temperature, "chain": chain,
                **accepted, "loop_share": round(loop_share(inside), 4),
                **cost_fields(costs, chain, accepted["tokens_per_call"]),
            }  # fmt: skip


def acceptance_fields(ranks: Sequence[Tensor], chain: int, outside: Sequence[Tensor]) -> Row:
    shape = TreeShape.chain(chain)
    whole = paired_acceptance(ranks, shape)
    apart = paired_acceptance(ranks, shape, outside)
    shares = [round(count / max(1, whole.rounds), 4) for count in whole.accepted_by_depth]
    return {
        "tokens_per_call": round(whole.tokens_per_call, 4), "rounds": whole.rounds,
        "accepted_by_depth": shares,
        "tokens_per_call_outside_loops": round(apart.tokens_per_call, 4),
    }  # fmt: skip


def cost_fields(costs: Costs, chain: int, tokens_per_call: float) -> Row:
    return {
        "draft_step_ms": round(costs.step_ms, 4), "round_ms": round(costs.round_ms[chain], 4),
        "plain_round_ms": round(costs.plain_ms, 4),
        "predicted_speedup": round(
            tokens_per_call * costs.plain_ms / costs.round_ms[chain], 3
        ),
    }  # fmt: skip


def fastest(rows: Sequence[Row]) -> tuple[str, int]:
    """The draft and chain of the best predicted speed-up, on average over what was measured."""
    keys = {(row["draft"], row["chain"]) for row in rows}

    def total(key: tuple[str, int]) -> float:
        return sum(r["predicted_speedup"] for r in rows if (r["draft"], r["chain"]) == key)

    return max(sorted(keys), key=total)


# ------------------------------------------------------------------------------- the confirmation


def confirmed(
    candidate: Candidate, method: str, chain: int, texts: TextsOf, rows: Sequence[Row],
    options: argparse.Namespace,
) -> Iterator[Row]:  # fmt: skip
    """The first task's prompts decoded with the real verifier at the same seeds."""
    speculation = {"model": str(candidate.folder), "method": method, "tree": f"chain-{chain}"}
    llm = engine(options, speculation)
    for (task, temperature), answers in texts.items():
        if task != options.tasks[0]:
            continue
        params = [
            SamplingParams(temperature=temperature, max_tokens=options.tokens, seed=text.seed)
            for text in answers
        ]
        outputs = llm.generate([{"prompt_token_ids": text.prompt} for text in answers], params)
        key = candidate.name, task, temperature, chain
        paired = next(
            row for row in rows
            if (row["draft"], row["task"], row["temperature"], row["chain"]) == key
        )  # fmt: skip
        stats = [output.speculation for output in outputs]
        decoded = sum(s.tokens for s in stats) / max(1, sum(s.rounds for s in stats))
        same = [
            output.outputs[0].token_ids == text.tokens[: text.length]
            for output, text in zip(outputs, answers, strict=True)
        ]
        yield {
            **dict(zip(("draft", "task", "temperature", "chain"), key, strict=True)),
            "paired": paired["tokens_per_call"],
            "decoded": round(decoded, 4),
            "identical_texts": round(sum(same) / len(same), 4),
        }  # fmt: skip


# -------------------------------------------------------------------------------------------- all


def engine(options: argparse.Namespace, speculation: Mapping[str, Any] | None) -> LLM:
    return LLM(
        options.model, options.dtype, speculation, device=options.device,
        max_num_seqs=options.batch, max_model_len=options.max_model_len,
        kv_cache_tokens=options.kv_tokens,
    )  # fmt: skip


def print_limit(target: Llama, mark: Mapping[str, Any]) -> None:
    """A plain round reads every weight once; on a card whose bandwidth is known."""
    if "copy_tb_s" in mark:
        size = sum(p.numel() * p.element_size() for p in target.parameters())
        print(f"limit: plain round {size / mark['copy_tb_s'] / 1e9:.3f} ms", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("drafts", type=Path, nargs="*", help="folders; default: the shipped draft")
    parser.add_argument("--out", default=None)
    parser.add_argument(
        "--texts", type=Path, default=Path("runs/texts"), help="folder to keep them"
    )
    parser.add_argument("--model", default=BUILT_IN)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--chains", type=int, nargs="+", default=[3, 7])
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--limit", type=int, default=None, help="prompts of each task")
    parser.add_argument("--batch", type=int, default=128, help="answers generated together")
    parser.add_argument("--kv-tokens", type=int, default=131072)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512, help="cached tokens of a timed round")
    parser.add_argument("--repeats", type=int, default=20, help="rounds that are timed")
    options = parser.parse_args()
    if max(options.chains) > OVERRUN:
        parser.error(f"--chains: texts are kept {OVERRUN} tokens past their end; give at most that")
    if len(set(options.chains)) < 2:
        parser.error("--chains: the cost of a step is what a longer one adds; give two")
    shipped = shipped_draft(options.model)
    if not options.drafts and shipped is None:
        parser.error(f"no draft is shipped for {options.model!r}; give folders")
    options.drafts = options.drafts or [shipped]
    return options


def main() -> None:
    options = arguments()
    options.device = choose_device(options.device).type
    device = torch.device(options.device)
    mark = fingerprint(device)
    print(mark, flush=True)
    candidates = [Candidate.of(folder) for folder in options.drafts]
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        raise SystemExit(f"two drafts have one name: {sorted(names)}; tell names in {SUMMARY}")
    llm = engine(options, None)
    texts, target = all_texts(llm, options), llm.engine.runner.models.target
    del llm
    free()
    print_limit(target, mark)
    plain_ms = round_ms(DecoderModels(target, None), 0, options)
    rows: list[Row] = []
    methods: dict[str, str] = {}
    for candidate in candidates:
        started = time.perf_counter()
        loaded = load_draft(candidate.folder, target, options.max_model_len)
        methods[candidate.name] = "eagle" if isinstance(loaded.draft, EagleDraft) else "eagle3"
        models = DecoderModels(target, Drafter(loaded.draft, loaded.head))
        models.pack()
        costs = costs_of(models, plain_ms, options)
        for row in draft_rows(candidate, models, costs, texts, options):
            rows.append(row)
            print(f"{time.perf_counter() - started:6.1f} s  {row}", flush=True)
    best, chain = fastest(rows)
    winner = next(candidate for candidate in candidates if candidate.name == best)
    del models, target
    free()
    checked = list(confirmed(winner, methods[best], chain, texts, rows, options))
    write_result(
        options.out,
        {
            **stamp(device), "fingerprint": mark, "model": options.model, "dtype": options.dtype,
            "max_tokens": options.tokens, "context": options.context, "fastest": best,
            "confirmed": checked, "rows": rows,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
