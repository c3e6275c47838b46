"""``aquiline bench serve``: latency, throughput and goodput of any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from aquiline.cli import options
from aquiline.cli.tune import positive_counts
from aquiline.core.errors import AquilineError
from aquiline.evaluation import client, load, serving
from aquiline.evaluation.tasks import TASKS


def serve(
    base_url: Annotated[str, typer.Option(help="Of the server, such as http://host:8000.")],
    model: Annotated[str | None, typer.Option(help="Default: the first that it names.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
    prompts: Annotated[
        str, typer.Option(help=f"{', '.join(TASKS)}; random; or a JSONL file.")
    ] = "mt-bench",
    trace: Annotated[
        Path | None, typer.Option(help="JSONL of at, prompt_tokens, output_tokens to replay.")
    ] = None,
    requests: Annotated[int, typer.Option(help="For each concurrency; prompts repeat.")] = 80,
    concurrency: Annotated[
        str, typer.Option(help="Requests in flight at most, comma-separated.")
    ] = "1,8,32",
    rate: Annotated[
        float | None, typer.Option(help="Arrivals a second; default: one as another ends.")
    ] = None,
    arrivals: Annotated[str, typer.Option(help="poisson or fixed, with --rate.")] = "poisson",
    prompt_tokens: Annotated[int, typer.Option(help="Of a random prompt.")] = 512,
    max_tokens: options.MaxTokens = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for full length; not every server knows the field.")
    ] = False,
    seeded: Annotated[
        bool, typer.Option(help="Give request i the seed i, for a load that can be repeated.")
    ] = False,
    goodput: Annotated[
        str | None, typer.Option(help="Limits in ms: ttft:500,ttit:25,e2e:10000.")
    ] = None,
    warm_up: Annotated[int, typer.Option(help="Requests ahead that do not count.")] = 1,
    seed: Annotated[int, typer.Option(help="Of arrivals and random prompts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here.")] = None,
    json_output: options.Json = False,
) -> None:
    """Send a load, stream the answers, report percentiles; acceptance from /metrics, if there."""
    sizes = positive_counts("--concurrency", concurrency)
    limits = serving.parse_limits(goodput) if goodput else None
    planned = _planned(prompts, trace, requests, prompt_tokens, seed)
    if trace is None and rate is not None:
        planned = load.arriving(planned, rate, arrivals, seed)  # type: ignore[arg-type]
    if seeded:
        planned = [replace(one, seed=number) for number, one in enumerate(planned)]
    fields: dict[str, Any] = {"temperature": temperature}
    if ignore_eos or trace is not None:
        fields["ignore_eos"] = True
    endpoint = client.Endpoint(base_url, model or "", api_key, max_tokens, fields)
    if model is None:
        endpoint = replace(endpoint, model=asyncio.run(client.only_model(endpoint)))
    console = Console(stderr=json_output, highlight=False, soft_wrap=True)
    ahead = [replace(one, at=None) for one in planned[:warm_up]]
    asyncio.run(client.put_load(endpoint, ahead, 1))
    rows = []
    for size in sizes:
        before = _counters(endpoint)
        answers = asyncio.run(client.put_load(endpoint, planned, size))
        row = serving.summary(answers, limits)
        if row["failed"] == row["requests"]:
            raise AquilineError(
                f"--base-url {base_url}: no request was answered ({answers[0].error}); correct the "
                "address or the load"
            )
        row = {"concurrency": size, **row}
        row["acceptance"] = serving.acceptance(before, _counters(endpoint))
        _print(console, row)
        rows.append(row | {"each": serving.request_rows(answers)})
    result = {
        "benchmark": "serve", "command": _command(api_key),
        "base_url": base_url, "model": endpoint.model, "server": _version(endpoint),
        "load": "trace" if trace else "closed" if rate is None else f"{arrivals}, {rate}/s",
        "prompts": str(trace or prompts), "max_tokens": max_tokens, "temperature": temperature,
        "versions": {
            **{name: importlib.metadata.version(name) for name in ("aquiline", "httpx")},
            "python": platform.python_version(),
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "rows": rows,
    }  # fmt: skip
    if out is not None:
        out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    if json_output:
        print(json.dumps(result))


def _command(api_key: str | None) -> str:
    """The command line as it was given, but for the key."""
    line = shlex.join(["aquiline", *sys.argv[1:]])
    return line.replace(api_key, "KEY") if api_key else line


def _planned(
    prompts: str, trace: Path | None, requests: int, prompt_tokens: int, seed: int
) -> list[load.Planned]:
    if trace is not None:
        return load.trace(trace, seed)
    if requests < 1 or prompt_tokens < 1:
        raise AquilineError("--requests, --prompt-tokens: give at least 1")
    if prompts == "random":
        return load.random_prompts(requests, prompt_tokens, seed)
    known = load.task_prompts(prompts) if prompts in TASKS else load.file_prompts(Path(prompts))
    return (known * -(-requests // len(known)))[:requests]


def _counters(endpoint: client.Endpoint) -> serving.Counters:
    return serving.speculation_counters(asyncio.run(client.page(endpoint, "/metrics")))


def _version(endpoint: client.Endpoint) -> str | None:
    """What the server says of itself at /version."""
    text = asyncio.run(client.page(endpoint, "/version"))
    return None if text is None else text[:200]


def _print(console: Console, row: dict[str, Any]) -> None:
    parts = [f"concurrency {row['concurrency']:>3}: {row['tokens_per_second']:.1f} tokens/s"]
    for name in serving.LATENCIES:
        times = row[f"{name}_ms"]
        if times is not None:
            shown = " / ".join(f"{times[f'p{rank}']:.1f}" for rank in serving.PERCENTILES)
            parts.append(f"{name.upper()} {shown} ms")
    if row["acceptance"] is not None:
        parts.append(f"TPC {row['acceptance']['tokens_per_call']:.2f}")
    if "goodput" in row:
        parts.append(f"goodput {row['goodput']['share']:.1%}")
    if row["failed"]:
        parts.append(f"{row['failed']} failed")
    console.print(", ".join(parts))
