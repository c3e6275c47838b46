"""What sampling parameters cost a decoding round, Llama-3.1-8B shapes, a chain of three.

    python -m benchmarks.parameters --out benchmarks/results/parameters.json

bf16, random weights, an EAGLE-3 draft with 32,000 draft tokens. A round is one replay of its graph.
"greedy only" has no table of adjustments at all: the limit. "none" has one and asks for nothing;
each row below sets one parameter for every request, and "all" every one but log-probabilities.
Configurations take turns, so that a card that warms up or slows down does so for all of them.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from aquiline.core.params import SamplingParams
from aquiline.evaluation.costs import measure_round_ms, pages_of
from aquiline.sampling.adjust import Adjustments
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.tree import TreeShape
from benchmarks.common import fingerprint, stamp, write_result
from benchmarks.shapes import LLAMA_31_8B, random_models

CHAIN = TreeShape.chain(3)
PROMPT, OUTPUT = range(0, 128_000, 97), range(0, 128_000, 331)
ENDS = (128_001, 128_009)
BIAS = dict.fromkeys(range(0, 128_000, 127), 0.5)
PARAMS = {
    "none": {},
    "temperature": {"temperature": 0.8},
    "filters": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    "penalties": {
        "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.2
    },
    "bias": {"logit_bias": BIAS},
    "bans": {"banned_token_ids": tuple(range(0, 1000, 3))},
    "min_tokens": {"min_tokens": 10**6, "max_tokens": 10**6},
    "log-probabilities": {"logprobs": 20},
}  # fmt: skip
ALL = {name: value for key, fields in PARAMS.items() if key != "log-probabilities"
       for name, value in fields.items()}  # fmt: skip
ROUNDS = 3  # turns of every configuration


def sampling_of(params: SamplingParams, batch: int, vocab: int) -> SamplingBatch:
    device = torch.device("cuda")
    table = Adjustments.empty(batch, vocab, device)
    for row in range(batch):
        table.set(row, params, PROMPT, OUTPUT, ENDS)
    return SamplingBatch.of([params] * batch, range(batch), device, None, table, range(batch))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=None)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    mark = fingerprint()
    print(mark, flush=True)
    models = random_models(LLAMA_31_8B, 16384)
    vocab = models.target.config.vocab_size
    wanted = {**PARAMS, "all": ALL}
    rows = []
    for batch in options.batches:
        planes = models.planes(pages_of(CHAIN, batch, options.context), 128)
        batches: dict[str, SamplingBatch | None] = {"greedy only": None}
        for name, fields in wanted.items():
            params = SamplingParams(**{"temperature": 0.0, **fields})
            batches[name] = sampling_of(params, batch, vocab)
        times: dict[str, list[float]] = {name: [] for name in batches}
        for _ in range(ROUNDS):
            for name, sampling in batches.items():
                ms = measure_round_ms(
                    models, planes, CHAIN, batch, options.context, sampling=sampling
                )
                times[name].append(ms)
        limit = statistics.median(times["greedy only"])
        for name, found in times.items():
            ms = statistics.median(found)
            row = {"batch": batch, "context": options.context, "parameters": name}
            rows.append({**row, "round_ms": round(ms, 3), "times_greedy": round(ms / limit, 4)})
            print(f"{batch:3} {name:18} {ms:7.3f} ms  {ms / limit:6.3f} x", flush=True)
        del planes
    write_result(options.out, {**stamp(), "fingerprint": mark, "rows": rows})


if __name__ == "__main__":
    main()
