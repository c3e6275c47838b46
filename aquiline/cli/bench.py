"""``aquiline bench latency``: TTFT, TTIT, tokens per second and TPC, plain and with a draft."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from aquiline.cli import options
from aquiline.cli.tune import positive_counts, prompt_texts
from aquiline.core.errors import AquilineError
from aquiline.core.params import SamplingParams, SpeculationParams
from aquiline.engine.llm import LLM
from aquiline.evaluation.latency import Latency, measure_decoding


def latency(
    model: options.Model = options.BUILT_IN,
    draft: options.Draft = None,
    method: options.Method = "eagle",
    tree: options.Tree = None,
    table: Annotated[
        str | None, typer.Option(help="File of aquiline tune, for --tree auto.")
    ] = None,
    verification: options.Verification = "coupled",
    retrieval: options.Retrieval = 0,
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,4,16",
    prompts: Annotated[
        int | None, typer.Option(help="MT-Bench first turns; default: twice the largest batch.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Take prompts from a text file, one a line, instead.")
    ] = None,
    max_tokens: options.MaxTokens = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the first prompt; the next one has the next.")] = 0,
    dtype: options.Dtype = "auto",
    json_output: options.Json = False,
) -> None:
    """Decode batches of one size through the engine, without and with a draft."""
    sizes = positive_counts("--batches", batches)
    texts = prompt_texts(prompts or min(80, 2 * sizes[-1]), prompts_file)
    texts = (texts * -(-sizes[-1] // len(texts)))[: max(len(texts), sizes[-1])]
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
    config = options.speculative_config(model, draft, tree, verification, method, retrieval)
    if config is not None and table is not None:
        config["dispatch_table"] = table
    if config is not None:
        SpeculationParams.from_config(config)  # refused before anything is measured
    console = Console(stderr=json_output, highlight=False, soft_wrap=True)
    rows: list[dict[str, object]] = []
    plain: dict[int, Latency] = {}
    for name, speculation in {"none": None, tree or "chain-3": config}.items():
        if name != "none" and speculation is None:
            console.print("no draft for this model: give --draft to compare")
            continue
        llm = LLM(
            model, dtype, speculation, max_num_seqs=sizes[-1],  # type: ignore[arg-type]
            enable_prefix_caching=False,
        )  # fmt: skip
        asked = [llm.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
        if max(map(len, asked)) + max_tokens > llm.engine.max_model_len:
            raise AquilineError(
                f"--max-tokens {max_tokens}: it passes the context of {llm.engine.max_model_len}"
            )
        for batch in sizes:
            found = measure_decoding(llm, asked, params, batch)
            row = latency_row(found, name, temperature, plain.setdefault(batch, found))
            rows.append(row)
            console.print(
                f"batch {batch:>3} {name:>8}: TTFT {found.ttft_ms:.1f} ms, TTIT "
                f"{found.ttit_ms:.3f} ms, {found.tokens_per_second:.1f} tokens/s, TPC "
                f"{found.tokens_per_call:.2f}, {row['speedup']}x"
            )
        device = llm.engine.runner.models.device
        del llm
    if json_output:
        cuda = device.type == "cuda"
        print(
            json.dumps(
                {
                    "model": model, "draft": draft or "shipped", "dtype": dtype,
                    "verification": verification, "retrieval": retrieval, "max_tokens": max_tokens,
                    "device": torch.cuda.get_device_name() if cuda else "cpu",
                    "torch": torch.__version__, "date": datetime.date.today().isoformat(),
                    "rows": rows,
                }
            )
        )  # fmt: skip


def latency_row(found: Latency, tree: str, temperature: float, plain: Latency) -> dict[str, object]:
    """A measurement as a row of a result; ``plain`` is that of the same load without a draft."""
    return {
        "batch": found.batch, "tree": tree, "temperature": temperature,
        "tokens_per_call": round(found.tokens_per_call, 3),
        "ttit_ms": round(found.ttit_ms, 4), "speedup": round(plain.ttit_ms / found.ttit_ms, 3),
        "ttft_ms": round(found.ttft_ms, 3), "round_ms": round(found.round_ms, 4),
        "tokens_per_second": round(found.tokens_per_second, 1), "rounds": found.rounds,
    }  # fmt: skip
