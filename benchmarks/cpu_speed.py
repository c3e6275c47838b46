"""CPU speed at batch 1, greedy, MT-Bench first turns: transformers, plain, speculative.

    python -m benchmarks.cpu_speed --dtype bfloat16 --tree chain-3 --out benchmarks/results/X.json

All engines answer each prompt in turn, so that a drift of the machine hits all alike; the figures
are medians over prompts of the ratio within a prompt. Only decoding counts: from the first token to
the last.
The limit printed first is the time to read the target's linear weights once, measured here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from aquiline import LLM, SamplingParams
from aquiline.cli.demo import timed
from aquiline.cli.options import BUILT_IN, speculative_config
from aquiline.evaluation.tasks import load_task
from aquiline.kernels import ops
from aquiline.layers.linear import ColumnParallelLinear, RowParallelLinear
from benchmarks.common import stamp, write_result

ANEW = {"enable_prefix_caching": False}  # a prefill is timed by running it twice


def weight_read_ms(llm: LLM, rows: int) -> float:
    """Median milliseconds for every linear layer of the target once, on ``rows`` rows."""
    target = llm.engine.runner.models.target
    linears = [
        m for m in target.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)
    ]
    inputs = [torch.randn(1, rows, m.weight.shape[1]).to(m.weight.dtype) for m in linears]
    times = []
    with torch.inference_mode():
        for _ in range(12):
            started = time.perf_counter()
            for linear, x in zip(linears, inputs, strict=True):
                ops.linear(x, linear.weight, None, linear._packed)
            times.append(time.perf_counter() - started)
    return statistics.median(times[2:]) * 1e3


def transformers_model(llm: LLM, dtype: torch.dtype) -> Any:
    """The same checkpoint in transformers, eager, with its default (dynamic) cache."""
    import transformers

    from aquiline.models.checkpoint import open_checkpoint
    from aquiline.models.registry import resolve

    checkpoint = open_checkpoint(resolve(BUILT_IN))
    config = transformers.LlamaConfig(**checkpoint.config.to_hf())
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(dict(checkpoint.tensors()), strict=False)
    return model.to(dtype).eval()


def transformers_seconds(model: Any, prompt: list[int], count: int) -> float:
    """Seconds per token of ``generate``, prefill taken off by a run of one token."""

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        return time.perf_counter() - started

    return (seconds(count) - seconds(1)) / (count - 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tree", default="chain-3")
    parser.add_argument("--draft", default=None)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--peer-every", type=int, default=1, help="ask transformers every Nth")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    torch.set_num_threads(2)
    config = speculative_config(BUILT_IN, options.draft, options.tree, "coupled")
    plain = LLM(BUILT_IN, options.dtype, None, max_num_seqs=1, device="cpu", **ANEW)
    fast = LLM(BUILT_IN, options.dtype, config, max_num_seqs=1, device="cpu", **ANEW)
    peer = transformers_model(plain, getattr(torch, options.dtype))
    params = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
    limit = {rows: round(weight_read_ms(plain, rows), 2) for rows in (1, 4, 8, 16)}
    print(f"limit: linear layers and head, ms by rows: {limit}", flush=True)

    rows: list[dict[str, float]] = []
    tasks = load_task("mt-bench")[:: 80 // options.prompts][: options.prompts]
    for index, task in enumerate(tasks):
        prompt = task.turns[0]
        a, b = timed(plain, prompt, params), timed(fast, prompt, params)
        ids = plain.tokenizer.encode_chat([{"role": "user", "content": prompt}])
        same = a.output.outputs[0].token_ids == b.output.outputs[0].token_ids
        row: dict[str, float] = {
            "plain_ms": 1e3 / a.tokens_per_second, "fast_ms": 1e3 / b.tokens_per_second,
            "identical": same, "tokens_per_call": b.output.speculation.tokens_per_call,
        }  # fmt: skip
        if index % options.peer_every == 0:
            row["transformers_ms"] = 1e3 * transformers_seconds(peer, ids, options.tokens)
        rows.append(row)
        print({key: round(float(value), 2) for key, value in rows[-1].items()}, flush=True)

    def median(
        ratio: Callable[[dict[str, float]], float], among: list[dict[str, float]] = rows
    ) -> float:
        return round(statistics.median(map(ratio, among)), 3)

    asked = [row for row in rows if "transformers_ms" in row]

    result = {
        "what": "cpu_speed", "dtype": options.dtype, "tree": options.tree,
        "prompts": len(rows), "tokens": options.tokens, "limit_ms_by_rows": limit,
        "speedup_over_plain": median(lambda r: r["plain_ms"] / r["fast_ms"]),
        "plain_over_transformers": median(
            lambda r: r["transformers_ms"] / r["plain_ms"], asked
        ),
        "plain_ms": median(lambda r: r["plain_ms"]), "fast_ms": median(lambda r: r["fast_ms"]),
        "transformers_ms": median(lambda r: r["transformers_ms"], asked),
        "tokens_per_call": median(lambda r: r["tokens_per_call"]),
        "identical": sum(bool(row["identical"]) for row in rows),
        "threads": torch.get_num_threads(), **stamp(torch.device("cpu")),
    }  # fmt: skip
    write_result(options.out, result)


if __name__ == "__main__":
    main()
