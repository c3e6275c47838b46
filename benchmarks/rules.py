"""What each verification rule accepts: TPC of SmolLM2 with the shipped draft, by tree and sampling.

    python -m benchmarks.rules --out benchmarks/results/rules.json
    python -m benchmarks.rules --limit 4 --tokens 32          # to try it on a CPU

MT-Bench first turns and HumanEval through the engine, every request with a seed of its own, under
each rule: a chain of 3, and (but for block verification) the rule's default tree for the
temperature. ``same_text`` is the share of texts that are those of the coupled chain, token for
token: the seed promise, in bf16 up to near ties. The limit of a row is depth + 1 tokens a call.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import torch

from aquiline.cli.options import BUILT_IN
from aquiline.core.outputs import RequestOutput, SpeculationStats
from aquiline.core.params import SamplingParams, SpeculationParams, VerificationRule
from aquiline.engine.config import EngineConfig
from aquiline.engine.engine import Engine
from aquiline.engine.loader import LoadedModel, choose_device, load, rule_of
from aquiline.evaluation.tasks import load_task
from aquiline.speculation.dispatch.default import default_tree
from aquiline.speculation.dispatch.dispatcher import OneTree
from aquiline.speculation.dispatch.paths import band_of
from aquiline.speculation.tree import TreeShape
from benchmarks.common import fingerprint, stamp, write_result

TASKS = ("mt-bench", "humaneval")
SAMPLING = ((0.0, 1.0), (0.6, 1.0), (1.0, 1.0), (1.0, 0.9))  # temperature, top_p
RULES: tuple[VerificationRule, ...] = get_args(VerificationRule)  # coupled is the first
CHAIN = TreeShape.chain(3)
NODES, DEPTH = 15, 5  # of the trees
MAX_MODEL_LEN, KV_TOKENS = 2048, 1024  # the latter for each row of the batch
Sampling = tuple[float, float]
Row = dict[str, Any]
Text = tuple[int, ...]


def shapes_of(rule: VerificationRule) -> dict[TreeShape, list[Sampling]]:
    """The trees of a rule, and what is sampled with each: an engine for every tree."""
    found: dict[TreeShape, list[Sampling]] = {CHAIN: list(SAMPLING)}
    if rule != "block":
        for temperature, top_p in SAMPLING:
            tree = default_tree(rule, band_of(temperature), NODES, DEPTH)
            found.setdefault(tree, []).append((temperature, top_p))
    return found


def engine_of(
    loaded: LoadedModel, config: EngineConfig, rule: VerificationRule, tree: TreeShape
) -> Engine:
    """On the same weights as all the others."""
    asked = SpeculationParams(tree=tree.paths, verification=rule)
    config = dataclasses.replace(config, speculation=asked)
    return Engine(config, dataclasses.replace(loaded, chooser=OneTree(tree), rule=rule_of(asked)))


def answer(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling, tokens: int
) -> list[RequestOutput]:
    """Prompt i has seed i, under every rule."""
    ids = [
        engine.add_request(
            prompt,
            SamplingParams(temperature=sampling[0], top_p=sampling[1], max_tokens=tokens, seed=i),
        )
        for i, prompt in enumerate(prompts)
    ]
    done: dict[int, RequestOutput] = {}
    while len(done) < len(ids):
        done |= {output.request_id: output for output in engine.step() if output.finished}
    return [done[request] for request in ids]


def acceptance(outputs: Sequence[RequestOutput]) -> Row:
    """Over all rounds of all requests: long texts weigh more."""
    stats = SpeculationStats.sum(output.speculation for output in outputs)
    shares = [round(count / max(stats.rounds, 1), 4) for count in stats.accepted_by_depth]
    return {
        "tokens_per_call": round(stats.tokens_per_call, 4),
        "accepted_by_depth": shares, "rounds": stats.rounds,
    }  # fmt: skip


def measured(
    loaded: LoadedModel, config: EngineConfig, rules: Sequence[VerificationRule],
    prompts: Mapping[str, Sequence[Sequence[int]]], tokens: int,
) -> Iterator[Row]:  # fmt: skip
    """A row for each rule, tree, setting and task; the coupled chain comes first."""
    texts: dict[tuple[str, Sampling], list[Text]] = {}
    for rule in rules:
        for tree, settings in shapes_of(rule).items():
            gc.collect()  # the engine before
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            engine = engine_of(loaded, config, rule, tree)
            for sampling in settings:
                for task, asked in prompts.items():
                    started = time.perf_counter()
                    outputs = answer(engine, asked, sampling, tokens)
                    said = [output.outputs[0].token_ids for output in outputs]
                    first = texts.setdefault((task, sampling), said)
                    same = sum(a == b for a, b in zip(said, first, strict=True)) / len(said)
                    yield {
                        "rule": rule, "tree": "chain-3" if tree == CHAIN else "best",
                        "nodes": tree.size - 1, "depth": tree.depth, "task": task,
                        "temperature": sampling[0], "top_p": sampling[1], **acceptance(outputs),
                        "same_text": round(same, 4),
                        "seconds": round(time.perf_counter() - started, 2),
                    }  # fmt: skip
            del engine


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--limit", type=int, default=None, help="prompts of each task")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = choose_device(options.device)
    started = time.perf_counter()
    mark = fingerprint(device)
    print(mark, flush=True)
    tasks = {task: load_task(task)[: options.limit] for task in TASKS}
    batch = min(options.batch, max(map(len, tasks.values())))
    config = EngineConfig(
        BUILT_IN, options.dtype, device.type, MAX_MODEL_LEN, batch,
        kv_cache_tokens=max(batch * KV_TOKENS, 2 * MAX_MODEL_LEN),
        speculation=SpeculationParams(num_speculative_tokens=NODES),  # room for every tree
    )  # fmt: skip
    loaded = load(config)
    encode = loaded.tokenizer.encode_chat
    prompts = {
        task: [encode([{"role": "user", "content": one.turns[0]}]) for one in found]
        for task, found in tasks.items()
    }
    rules = [rule for rule in RULES if rule in {RULES[0], *options.rules}]
    rows = []
    for row in measured(loaded, config, rules, prompts, options.tokens):
        rows.append(row)
        print(f"{time.perf_counter() - started:6.1f} s  {row}", flush=True)
    write_result(
        options.out,
        {
            **stamp(device), "fingerprint": mark, "model": BUILT_IN, "dtype": options.dtype,
            "batch": batch, "tokens": options.tokens,
            "prompts": {task: len(asked) for task, asked in prompts.items()}, "rows": rows,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
