"""What speculation gains at 8B shapes with the acceptance of the paper's draft, and where it stops.

    python -m benchmarks.speedup_8b --out benchmarks/results/speedup_8b.json

Random weights and a rule that accepts by coin toss: a chain of 3 emits 2.78 tokens a round. At 8192
context a chain of 3 against plain decoding without a draft (goal 2.2x); at 1024 context large
batches: chains of 1 to 3, plain rounds in which the draft keeps up, and what the dispatcher picks
from these costs. Rounds are captured graphs, replayed back to back.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch

from aquiline.core.params import SamplingParams
from aquiline.decoding.models import DecoderModels
from aquiline.evaluation.costs import measure_round_ms, pages_of
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.dispatch.costs import CostPoint, CostTable
from aquiline.speculation.dispatch.dispatcher import PLAIN, Dispatcher
from aquiline.speculation.dispatch.paths import PathShares, PathTable
from aquiline.speculation.tree import TreeShape
from aquiline.speculation.verification.noise import RoundNoise
from benchmarks.common import fingerprint, machine, stamp, write_result
from benchmarks.shapes import models_for, synthetic

SHARES = (0.78, 0.58, 0.42)  # of rounds that reach depth 1, 2, 3: 2.78 tokens
GOAL = 2.2
CHAINS = tuple(TreeShape.chain(depth) for depth in (1, 2, 3))
PENDING = 4  # pairs of a state that serves chains up to 3


@torch.inference_mode()
def tokens_per_round(tree: TreeShape, rows: int = 2**18) -> float:
    """Mean of what the rule emits, over many seeds and positions; on the CPU, with its hash."""
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(1)
    seeds = torch.randint(2**62, (rows,), generator=generator).tolist()
    tables = tree.tables(device)
    positions = torch.randint(16384, (rows, 1), generator=generator)
    positions = positions + torch.arange(tree.depth + 1)
    sampling = SamplingBatch.of([SamplingParams(temperature=0)] * rows, seeds, device)
    rule = synthetic(SHARES)(RoundNoise(tables, sampling, positions, 8, None))
    tokens = torch.zeros(rows, tree.size, dtype=torch.int64, device=device)
    verdict = rule.accept(tokens, torch.zeros(rows, tree.size, 8, device=device))
    return 1 + float(verdict.accepted.double().mean())


class Rounds:
    """Measured milliseconds by load and tree."""

    def __init__(self, models: DecoderModels, repeats: int) -> None:
        self.models, self.repeats = models, repeats
        self.plain = DecoderModels(models.target, None)

    def ms(self, batch: int, context: int, trees: dict[str, TreeShape]) -> dict[str, float]:
        """All trees on one cache, which is then free; "none" is measured without the draft."""
        models, device = self.models, self.models.device
        largest = max(trees.values(), key=lambda tree: tree.size)
        planes = models.planes(pages_of(largest, batch, context), 128)
        found = {}
        for name, tree in trees.items():
            bare = name == "none"
            found[name] = measure_round_ms(
                self.plain if bare else models, planes, tree, batch, context, synthetic(SHARES),
                repeats=self.repeats, pending=1 if bare else PENDING,
            )  # fmt: skip
            print(f"  {context:5} x {batch:3} {name:14} {found[name]:8.3f} ms", flush=True)
        del planes
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return found


def speedups(rounds: Rounds, batches: list[int], context: int, tokens: float) -> list[dict]:
    rows = []
    for batch in batches:
        ms = rounds.ms(batch, context, {"none": PLAIN, "chain-3": CHAINS[-1]})
        ratio = ms["none"] / (ms["chain-3"] / tokens)
        rows.append(
            {"context": context, "batch": batch, "plain_ttit_ms": round(ms["none"], 4),
             "chain_3_round_ms": round(ms["chain-3"], 4),
             "chain_3_ttit_ms": round(ms["chain-3"] / tokens, 4), "speedup": round(ratio, 3),
             "ok": ratio >= GOAL}
        )  # fmt: skip
        print(f"{rows[-1]}", flush=True)
    return rows


def back_off(rounds: Rounds, batches: list[int], context: int, tokens: dict[str, float]
             ) -> list[dict]:  # fmt: skip
    """Costs at every batch, then the dispatcher's choice from all of them."""
    trees = {f"chain-{tree.depth}": tree for tree in CHAINS}
    trees = {"none": PLAIN, "none, drafting": PLAIN, **trees}
    measured = {batch: rounds.ms(batch, context, trees) for batch in batches}
    points = [
        CostPoint(batch, trees[name].size, trees[name].depth, batch * context, ms)
        for batch, found in measured.items()
        for name, ms in found.items()
        if name != "none"
    ]
    shares = {(0,) * depth: share for depth, share in enumerate(SHARES, start=1)}
    paths = PathTable((PathShares("coupled", "greedy", 1, shares),))
    rows = []
    for batch, found in measured.items():
        dispatcher = Dispatcher((PLAIN, *CHAINS), paths, CostTable(points))
        pick = dispatcher.candidates[dispatcher.choose(batch, batch * context, "greedy")]
        name = f"chain-{pick.depth}" if pick.depth else "none, drafting"
        ttit = {one: ms / tokens.get(one, 1.0) for one, ms in found.items()}
        rows.append(
            {"context": context, "batch": batch, "dispatcher": name,
             "dispatcher_over_plain": round(ttit[name] / ttit["none"], 4),
             "ok": ttit[name] <= 1.02 * ttit["none"],
             "ttit_ms": {one: round(ms, 4) for one, ms in ttit.items()},
             "round_ms": {one: round(ms, 4) for one, ms in found.items()}}
        )  # fmt: skip
        print(f"{rows[-1]}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=None)
    parser.add_argument("--device", default=machine().type)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 48])
    parser.add_argument("--large-context", type=int, default=1024)
    parser.add_argument("--large-batches", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--repeats", type=int, default=12)
    options = parser.parse_args()
    device = torch.device(options.device)
    mark = fingerprint(device)
    print(mark, flush=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    tokens = {f"chain-{tree.depth}": tokens_per_round(tree) for tree in CHAINS}
    print(f"tokens per round by the rule: {tokens}", flush=True)
    rounds = Rounds(models_for(device.type), options.repeats)
    if "copy_tb_s" in mark:
        target = rounds.models.target
        size = 2 * (
            sum(p.numel() for p in target.parameters()) - target.embed_tokens.weight.numel()
        )
        each = options.context * target.plane_shape().bytes_per_token(torch.bfloat16)
        for batch in options.batches:
            limit = (size + batch * each) / mark["copy_tb_s"] / 1e9
            print(f"limit: plain round at batch {batch}: {limit:.2f} ms", flush=True)
    rows = speedups(rounds, options.batches, options.context, tokens["chain-3"])
    large = back_off(rounds, options.large_batches, options.large_context, tokens)
    payload: dict[str, Any] = {
        **stamp(device), "fingerprint": mark, "shares": SHARES,
        "tokens_per_round": {name: round(mean, 4) for name, mean in tokens.items()},
        "goal": GOAL, "ok": all(row["ok"] for row in (*rows, *large)), "rows": rows,
        "large_batches": large,
    }  # fmt: skip
    write_result(options.out, payload)


if __name__ == "__main__":
    main()
