"""Milliseconds of a decoding round, Llama-3.1-8B shapes, against what the card's bandwidth allows.

    python -m benchmarks.round --out benchmarks/results/round.json

bf16, random weights, an EAGLE-3 draft of one layer with 32,000 draft tokens. A round is one replay
of its graph; replays follow each other as in the engine. The limit counts every byte once over the
measured copy bandwidth, or the multiplications over the measured rate, whichever takes longer.
First the target's linear layers and head alone, for a few rows, beside cuBLAS.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aquiline.decoding.models import DecoderModels
from aquiline.evaluation.costs import measure_round_ms, pages_of
from aquiline.kernels import ops
from aquiline.models.llama import Llama
from aquiline.speculation.dispatch.default import default_tree
from aquiline.speculation.tree import TreeShape
from benchmarks.common import fingerprint, graph_ms, stamp, write_result
from benchmarks.shapes import LLAMA_31_8B, random_models

ROWS = (  # context, batch, draft
    (8192, 1, "none"), (8192, 1, "chain-3"), (8192, 16, "none"), (8192, 16, "chain-3"),
    (8192, 48, "none"), (8192, 48, "chain-3"), (1024, 64, "none"), (1024, 64, "chain-5"),
    (1024, 1, "none"), (1024, 1, "chain-5"), (1024, 1, "tree-32"), (1024, 1, "tree-64"),
    (8192, 1, "chain-5"), (8192, 1, "tree-32"), (8192, 1, "tree-64"), (1024, 8, "chain-5"),
    (8192, 4, "chain-3"), (8192, 32, "chain-3"), (1024, 128, "none"), (1024, 128, "chain-3"),
    (1024, 256, "none"), (1024, 256, "chain-2"),
)  # fmt: skip


LINEAR_ROWS = (1, 4, 16, 32, 64)
Multiply = Callable[[Tensor, Tensor], Tensor]


def tree_named(name: str) -> TreeShape:
    """ "none", "chain-N", or "tree-N": the likeliest N nodes, root counted, within depth 5."""
    if name == "none":
        return TreeShape.chain(0)
    kind, size = name.split("-")
    if kind == "tree":
        return default_tree("coupled", "greedy", int(size) - 1, 5)
    return TreeShape.named(name)


@dataclass(frozen=True)
class Card:
    """Bytes and multiply-adds a millisecond."""

    bytes_per_ms: float
    flops_per_ms: float

    @classmethod
    def measured(cls, copy_tb_s: float) -> Card:
        """The rate from a square bf16 product of 8192."""
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        return cls(copy_tb_s * 1e9, 2 * 8192**3 / graph_ms(lambda: a @ b))

    def ms(self, weights: int, rows: int, kv_bytes: int) -> float:
        """Of one pass: ``weights`` parameters in bf16 over ``rows`` tokens, and the cache."""
        return max(
            (2 * weights + kv_bytes) / self.bytes_per_ms, 2 * weights * rows / self.flops_per_ms
        )


def weights_read(target: Llama) -> int:
    """Parameters that a pass reads: all but the embedding's."""
    return sum(p.numel() for p in target.parameters()) - target.embed_tokens.weight.numel()


def limit_ms(models: DecoderModels, card: Card, tree: TreeShape, batch: int, context: int) -> float:
    """The target's pass over all nodes; the draft's layer and head once a level."""
    target, drafter = models.target, models.drafter
    weights = weights_read(target)
    kv = batch * context * target.plane_shape().bytes_per_token(models.dtype)
    total = card.ms(weights, batch * tree.size, kv)
    if drafter is None or tree.depth == 0:
        return total
    fc = drafter.draft.fc.weight.numel()
    layer = sum(p.numel() for p in drafter.draft.parameters()) - fc
    head = drafter.head.lm_head.weight.numel()
    kv = batch * context * drafter.draft.plane_shape().bytes_per_token(models.dtype)
    return total + card.ms(fc, batch, 0) + tree.depth * card.ms(layer + head, batch, kv)


@torch.inference_mode()
def linears(target: Llama, card: Card) -> list[dict[str, float]]:
    """Rows of rows, linears_ms, cublas_ms, limit_ms: every linear layer and the head, one after
    another. Each of ours waits for the one in front, as in a round."""
    found = []
    width = target.config.hidden_size
    for rows in LINEAR_ROWS:
        x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
        inner = torch.randn(
            rows, target.config.intermediate_size, device="cuda", dtype=torch.bfloat16
        )

        def products(
            plain: Multiply, gated: Multiply, x: Tensor = x, inner: Tensor = inner
        ) -> None:
            for layer in target.layers:
                attention, mlp = layer.self_attn, layer.mlp
                plain(x, attention.qkv_proj.weight)
                plain(x, attention.o_proj.weight)
                gated(x, mlp.gate_up_proj.weight)
                plain(inner, mlp.down_proj.weight)
            plain(x, target.lm_head.weight)

        ours = graph_ms(functools.partial(products, ops.linear, ops.gated_linear))
        cublas = graph_ms(functools.partial(products, F.linear, F.linear))
        found.append({"rows": rows, "linears_ms": round(ours, 3),
                      "cublas_ms": round(cublas, 3),
                      "limit_ms": round(card.ms(weights_read(target), rows, 0), 3)})  # fmt: skip
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=None)
    parser.add_argument("--only", type=int, default=len(ROWS), help="the first N rows")
    options = parser.parse_args()
    mark = fingerprint()
    print(mark, flush=True)
    card = Card.measured(mark["copy_tb_s"])
    models = random_models(LLAMA_31_8B, 16384)
    plain = DecoderModels(models.target, None)
    alone = linears(models.target, card)
    rows = []
    for context, batch, name in ROWS[: options.only]:
        tree = tree_named(name)
        used = plain if name == "none" else models
        limit = limit_ms(used, card, tree, batch, context)
        planes = used.planes(pages_of(tree, batch, context), 128)
        ms = measure_round_ms(used, planes, tree, batch, context)
        del planes
        rows.append({"context": context, "batch": batch, "draft": name,
                     "round_ms": round(ms, 3), "limit_ms": round(limit, 3)})  # fmt: skip
        print(f"{context:6} x {batch:3} {name:8} limit {limit:6.2f}  round {ms:6.2f}", flush=True)
    write_result(options.out, {**stamp(), "fingerprint": mark, "linears": alone, "rows": rows})


if __name__ == "__main__":
    main()
