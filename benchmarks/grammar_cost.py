"""What a grammar costs a decoding round, Llama-3.1-8B shapes, a chain of three, through the engine.

    python -m benchmarks.grammar_cost --out benchmarks/results/grammar_cost.json

bf16, random weights, an EAGLE-3 draft, temperature 1, a seed for each prompt. The form is a list of
objects without an end; its vocabulary is that of a real tokenizer, over and over. "none" is the
limit: one graph, and the CPU a round ahead. Under "form" three graphs draw under masks that the
host makes between them; "mixed" asks it of every other request. Rounds are compared, from one step
to the next; tokens per call, and with them TTIT, are those of flat random laws, under which the
noise that draft and target share is accepted now and then. Configurations take turns on one engine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass, replace

import torch

from aquiline.core.guided_params import StructuredOutput
from aquiline.core.outputs import RequestOutput, SpeculationStats
from aquiline.core.params import SamplingParams
from aquiline.decoding.models import DecoderModels
from aquiline.engine.engine import Engine
from aquiline.guided.grammar import Grammars
from aquiline.models.registry import resolve
from aquiline.text.tokenizer import load_tokenizer
from benchmarks.common import fingerprint, machine, stamp, write_result
from benchmarks.shapes import models_for
from benchmarks.trace import FoldedTokenizer, engine_of

FORM = StructuredOutput(
    grammar=r"""root ::= object ", " root
object ::= "{\"name\": \"" [a-z ]{1,20} "\", \"age\": " [0-9]{1,3} ", \"tag\": " tag "}"
tag ::= "\"red\"" | "\"green\"" | "\"blue\""
"""
)
TURNS, WARM_UP = 3, 4


@dataclass(frozen=True)
class Steps:
    """Of one batch: milliseconds of a step, and tokens of a request in it."""

    ms: float
    tokens: float


def guided_engine(models: DecoderModels, batch: int, context: int) -> Engine:
    """Its tokenizer's vocabulary is repeated up to the model's; the last token ends a text."""
    tokenizer = load_tokenizer(resolve("smollm2-135m-instruct"))
    engine = engine_of(models, FoldedTokenizer(tokenizer), batch, context)
    vocab, known = models.target.config.vocab_size, tokenizer.token_bytes()
    tokens = [known[token % len(known)] for token in range(vocab)]
    engine.grammars = Grammars(
        tokens, vocab, [vocab - 1], lambda text: tokenizer.encode(text, add_special_tokens=False)
    )
    return engine


def measure(engine: Engine, forms: list[bool], context: int, steps: int) -> Steps:
    """Steady steps of a batch of requests, with and without the form."""
    chance, vocab = random.Random(0), engine.runner.models.target.config.vocab_size
    free = SamplingParams(max_tokens=None, ignore_eos=True)
    form = replace(free, structured_outputs=FORM, ignore_eos=False)
    ids = [
        engine.add_request(
            chance.choices(range(vocab), k=context), replace(form if has else free, seed=seed)
        )
        for seed, has in enumerate(forms)
    ]
    latest = dict[int, RequestOutput]()
    while len(latest) < len(ids):
        latest |= {output.request_id: output for output in engine.step()}
    for _ in range(WARM_UP):  # kernels are compiled when they are first needed
        latest |= {output.request_id: output for output in engine.step()}
    before = SpeculationStats.sum(latest[i].speculation for i in ids)
    started = time.perf_counter()
    for _ in range(steps):
        latest |= {output.request_id: output for output in engine.step()}
    seconds = time.perf_counter() - started
    after = SpeculationStats.sum(latest[i].speculation for i in ids)
    for request in ids:
        engine.abort(request)
    for _ in range(engine.runner.ahead + 1):
        engine.step()
    rounds = after.rounds - before.rounds
    return Steps(1e3 * seconds / steps, (after.tokens - before.tokens) / max(rounds, 1))


def rows_of(models: DecoderModels, batch: int, context: int, steps: int) -> list[dict]:
    """One row a configuration, medians over the turns."""
    wanted = {"none": [False] * batch, "form": [True] * batch}
    if batch > 1:
        wanted["mixed"] = [row % 2 == 0 for row in range(batch)]
    engine = guided_engine(models, batch, context)
    for forms in wanted.values():
        measure(engine, forms, context, 2)
    turns = [
        {name: measure(engine, forms, context, steps) for name, forms in wanted.items()}
        for _ in range(TURNS)
    ]
    found, limit = [], statistics.median(turn["none"].ms for turn in turns)
    for name in wanted:
        ms = statistics.median(turn[name].ms for turn in turns)
        tokens = statistics.median(turn[name].tokens for turn in turns)
        found.append(
            {"batch": batch, "context": context, "form": name, "round_ms": round(ms, 4),
             "times_none": round(ms / limit, 4), "tpc": round(tokens, 3),
             "ttit_ms": round(ms / tokens, 4)}
        )  # fmt: skip
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", default=None)
    parser.add_argument("--device", default=machine().type)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    device = torch.device(options.device)
    mark = fingerprint(device)
    print(mark, flush=True)
    models = models_for(device.type)
    rows = [
        row
        for batch in options.batches
        for row in rows_of(models, batch, options.context, options.steps)
    ]
    write_result(options.out, {**stamp(device), "fingerprint": mark, "rows": rows})


if __name__ == "__main__":
    main()
