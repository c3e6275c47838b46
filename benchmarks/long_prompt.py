"""A long prompt arrives among streams: how long their deliveries stop.

    python -m benchmarks.long_prompt --out benchmarks/results/long_prompt.json

SmolLM2 with its draft, eight streams, and a prompt of 6000 tokens when they are under way. A gap is
the time between two deliveries to one stream; counted are those from a while before the prompt
arrives until a while after its first token. Once with the default budget, once with the whole
prompt in one step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise
from typing import Any

from aquiline import LLM, SamplingParams
from aquiline.cli.options import BUILT_IN
from aquiline.cli.tune import prompt_texts
from aquiline.engine.loader import choose_device
from benchmarks.common import stamp, write_result


def measured(options: argparse.Namespace, budget: int | None) -> dict[str, Any]:
    """Gaps in milliseconds. ``ratio``: the longest over the median."""
    llm = LLM(
        BUILT_IN, options.dtype, {"tree": options.tree}, device=options.device,
        max_num_seqs=options.streams + 1, kv_cache_tokens=options.kv_tokens,
        max_num_batched_tokens=budget,
    )  # fmt: skip
    engine, texts = llm.engine, prompt_texts(80, None)
    endless = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    encode = llm.tokenizer.encode_chat
    prompts = [encode([{"role": "user", "content": text}]) for text in texts[: options.streams]]
    # The first prompt warms up: graphs and kernels of both kinds of steps.
    for words in (texts[::-1], texts):
        many = llm.tokenizer.encode("\n\n".join(words * (1 + options.tokens // 3000)))
        streams = {engine.add_request(prompt, endless): list[float]() for prompt in prompts}
        while not all(streams.values()):
            deliver(llm, streams)
        for times in streams.values():
            times.clear()
        for _ in range(options.margin):
            deliver(llm, streams)
        started = time.perf_counter()
        long = engine.add_request(many[: options.tokens], endless)
        firsts: dict[int, list[float]] = {long: []}
        while not firsts[long]:
            deliver(llm, streams | firsts)
        for _ in range(options.margin):
            deliver(llm, streams)
        for request in (*streams, long):
            engine.abort(request)
    gaps = [1e3 * (b - a) for times in streams.values() for a, b in pairwise(times)]
    median = statistics.median(gaps)
    return {
        "max_num_batched_tokens": budget,
        "budget": tuple(engine.scheduler.budget),
        "median_ms": round(median, 3),
        "max_ms": round(max(gaps), 3),
        "ratio": round(max(gaps) / median, 3),
        "ttft_ms": round(1e3 * (firsts[long][0] - started), 1),
        "gaps": len(gaps),
    }


def deliver(llm: LLM, times: dict[int, list[float]]) -> None:
    """One step; when each request got something."""
    for output in llm.engine.step():
        if output.request_id in times:
            times[output.request_id].append(time.perf_counter())


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tree", default="chain-3")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=6000, help="of the long prompt")
    parser.add_argument("--margin", type=int, default=30, help="steps before and after")
    parser.add_argument("--kv-tokens", type=int, default=32768)
    parser.add_argument("--budgets", type=int, nargs="*", default=[], help="others to measure")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    budgets = [None, *options.budgets, options.tokens]
    write_result(
        options.out,
        {
            **stamp(choose_device(options.device)), "model": BUILT_IN, "dtype": options.dtype,
            "tree": options.tree, "streams": options.streams, "tokens": options.tokens,
            "rows": [measured(options, budget) for budget in budgets],
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
