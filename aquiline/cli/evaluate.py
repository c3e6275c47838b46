"""``aquiline evaluate``: acceptance of a draft on MT-Bench, HumanEval and GSM8K."""

from __future__ import annotations

import datetime
import json
import time
from typing import Annotated

import torch
import typer
from rich.console import Console

from aquiline.cli import options
from aquiline.core.params import SamplingParams
from aquiline.engine.llm import LLM
from aquiline.evaluation.acceptance import task_acceptance
from aquiline.evaluation.tasks import load_task


def evaluate(
    model: options.Model = options.BUILT_IN,
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = "mt-bench,humaneval,gsm8k",
    max_tokens: options.MaxTokens = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus mass, in (0, 1].")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    batch: Annotated[int, typer.Option(help="Requests decoded together.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Questions of each task; default all.")] = None,
    draft: options.Draft = None,
    method: options.Method = "eagle",
    tree: options.Tree = None,
    verification: options.Verification = "coupled",
    retrieval: options.Retrieval = 0,
    dtype: options.Dtype = "auto",
    json_output: options.Json = False,
) -> None:
    """Tokens per call (TPC) and acceptance by depth on benchmark prompts."""
    config = options.speculative_config(model, draft, tree, verification, method, retrieval)
    llm = LLM(model, dtype, config, max_num_seqs=batch, kv_cache_tokens=batch * 4096)  # type: ignore[arg-type]
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    console = Console(stderr=json_output, highlight=False)
    rows = []
    for name in tasks.split(","):
        prompts = load_task(name)[:limit]
        started = time.perf_counter()
        result = task_acceptance(llm, prompts, params)
        rows.append(
            {
                "task": name, "questions": len(prompts), "answers": result.answers,
                "rounds": result.rounds, "tokens": result.tokens,
                "tokens_per_call": round(result.tokens_per_call, 4),
                "accepted_by_depth": [round(share, 4) for share in result.by_depth],
                "seconds": round(time.perf_counter() - started, 1),
            }
        )  # fmt: skip
        depths = " ".join(f"{share:.3f}" for share in result.by_depth)
        console.print(f"{name:>10}: TPC {result.tokens_per_call:.3f} ({depths})")
    if json_output:
        device = llm.engine.runner.models.device
        where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        print(
            json.dumps(
                {
                    "model": model, "draft": draft or "shipped", "tree": tree or "chain-3",
                    "dtype": dtype, "temperature": temperature, "top_p": top_p,
                    "verification": verification, "retrieval": retrieval,
                    "max_tokens": max_tokens, "device": where,
                    "torch": torch.__version__, "date": datetime.date.today().isoformat(),
                    "rows": rows,
                }
            )
        )  # fmt: skip
