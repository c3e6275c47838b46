"""Multi-round speculative sampling (PAPER; EAGLE, SpecInfer): accept siblings by ratio.

At a node with target distribution ``residual`` and draft distribution ``proposal``, its children
were drawn from ``proposal`` without replacement. Each is accepted with probability
min(1, residual / proposal at it); on rejection

    residual <- norm(max(0, residual - proposal)),   proposal <- norm(proposal with it removed),

and the next sibling is tried; when none is left, the token is drawn from ``residual``. Exact by
induction over siblings and depth (docs/losslessness.md), on static trees only. Proposal, acceptance
and residual draw use disjoint random streams.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquiline.kernels import ops
from aquiline.sampling.draw import draw_top, position_noise
from aquiline.sampling.filters import score_floor
from aquiline.speculation.tree import TreeTables
from aquiline.speculation.verification.noise import RoundNoise
from aquiline.speculation.verification.verdict import Verdict, verdict_of


class MultiRound:
    """The rule for one round of a batch, see ``rules.Rule``."""

    any_proposal = False

    def __init__(self, round_: RoundNoise) -> None:
        self.round = round_
        self._noise = position_noise(
            round_.sampling, round_.positions, round_.vocab, ops.Stream.PROPOSE
        )
        self._draft_logits: list[Tensor] = []

    def propose(self, logits: Tensor, depth: int, count: int) -> Tensor:
        """The best of log draft_probs + noise are draws without replacement (Gumbel top-k).

        Greedy rows get no noise: their children are the plain top-k.
        """
        self._draft_logits.append(logits)
        round_ = self.round
        levels = round_.tree.expanded_depths[depth - 1]
        return draw_top(logits, round_.sampling, self._noise, levels, round_.draft_ids, count)

    def accept(self, tokens: Tensor, logits: Tensor) -> Verdict:
        round_ = self.round
        drafted = self._draft_logits or [logits[:, :0]]
        return accept(round_, tokens, logits, torch.cat(drafted, dim=1))


def accept(
    round_: RoundNoise, tokens: Tensor, target_logits: Tensor, draft_logits: Tensor
) -> Verdict:
    """Walk down the tree, sibling by sibling.

    Args:
        tokens: [B, N] the token at each node.
        target_logits: [B, N, V] after each node.
        draft_logits: [B, E, Vd] that the children of the expanded nodes were drawn from, level by
            level.
    """
    tree, sampling = round_.tree, round_.sampling
    leaf, bonus = ops.multi_round_accept(
        target_logits, score_floor(target_logits, sampling),
        draft_logits, score_floor(draft_logits, sampling),
        tokens, sampling.temperature, tree.children, tree.expanded_index, draft_columns(round_),
        round_.key(ops.Stream.ACCEPT), round_.key(ops.Stream.RESIDUAL),
    )  # fmt: skip
    return verdict_at(tree, tokens, leaf, bonus)


def draft_columns(round_: RoundNoise) -> Tensor | None:
    """[V] the draft's index of each target token, -1 where it has none; None: the same index."""
    ids = round_.draft_ids
    if ids is None:
        return None
    columns = torch.full((round_.vocab,), -1, dtype=torch.int64, device=ids.device)
    return columns.scatter_(0, ids, torch.arange(len(ids), device=ids.device))


def verdict_at(tree: TreeTables, tokens: Tensor, leaf: Tensor, bonus: Tensor) -> Verdict:
    """The path to the leaf [B] is accepted; the bonus token [B] follows."""
    verdict = verdict_of(tree, leaf, tokens)
    # ``tokens`` at the path are the accepted tokens, root first; shift them up and add the bonus.
    emitted = torch.roll(verdict.tokens, -1, dims=1)
    emitted = emitted.scatter(1, verdict.accepted[:, None], bonus[:, None])
    return Verdict(verdict.accepted, verdict.path, emitted)
