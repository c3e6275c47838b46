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
from aquiline.sampling.batch import SamplingBatch
from aquiline.sampling.filters import filtered_scores, probabilities
from aquiline.speculation.tree import TreeTables
from aquiline.speculation.verification.noise import RoundNoise
from aquiline.speculation.verification.verdict import Verdict, verdict_of


class MultiRound:
    """The rule for one round of a batch, see ``rules.Rule``."""

    def __init__(self, round_: RoundNoise) -> None:
        self.round = round_
        sampling = round_.sampling
        noise = ops.gumbel_noise(
            sampling.seeds, sampling.choices, round_.positions, round_.vocab, ops.Stream.PROPOSE
        )
        self._noise = noise.masked_fill_((sampling.temperature == 0)[:, None, None], 0.0)
        self._draft_probs: list[Tensor] = []

    def child_scores(self, logits: Tensor, depth: int) -> Tensor:
        """log draft_probs + noise: its k best are k draws without replacement (Gumbel top-k).

        Greedy rows get no noise: their children are the plain top-k.
        """
        scores = filtered_scores(logits, self.round.sampling)
        self._draft_probs.append(self.round.to_vocab(scores.softmax(dim=-1)))
        return scores + self.round.of_draft(self._noise[:, depth - 1 : depth])

    def accept(self, tokens: Tensor, logits: Tensor) -> Verdict:
        round_ = self.round
        target_probs = probabilities(logits, round_.sampling)
        draft_probs = torch.zeros_like(target_probs)
        for level_probs, nodes in zip(self._draft_probs, round_.tree.expanded_nodes, strict=True):
            draft_probs[:, nodes] = level_probs.to(draft_probs.dtype)
        return accept(
            round_.tree, tokens, target_probs, draft_probs, round_.positions, round_.sampling
        )


def accept(
    tree: TreeTables,
    tokens: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    positions: Tensor,
    sampling: SamplingBatch,
) -> Verdict:
    """Walk down the tree, sibling by sibling.

    Args:
        tokens: [B, N] the token at each node.
        target_probs: [B, N, V] the target's distribution after each node.
        draft_probs: [B, N, V] the distribution its children were drawn from (rows of leaves are
            not read).
        positions: [B, D + 1] absolute position of the token emitted at each depth; keys the noise.
    """
    shape, batch = tree.shape, tokens.shape[0]
    vocab = target_probs.shape[-1]
    noise = (sampling.seeds, sampling.choices, positions)
    siblings = max((len(children) for children in shape.children), default=0)
    uniforms = ops.uniform_noise(*noise, max(siblings, 1), ops.Stream.ACCEPT)
    gumbel = ops.gumbel_noise(*noise, vocab, ops.Stream.RESIDUAL)
    rows = torch.arange(batch, device=tokens.device)
    leaf = torch.zeros(batch, dtype=torch.int64, device=tokens.device)
    residual_at_leaf = target_probs[:, 0].clone()
    for depth in range(shape.depth):
        above = [node for node in range(shape.size) if shape.depths[node] == depth]
        reached = leaf.clone()  # the node each request stands on, if it got this far
        for node in above:
            if not shape.children[node]:
                continue
            here = reached == node
            residual, proposal = target_probs[:, node], draft_probs[:, node]
            open_ = here.clone()  # requests still trying this node's children
            for rank, child in enumerate(shape.children[node]):
                token = tokens[:, child]
                drawn_with = proposal[rows, token]  # 0: the draft had run out of tokens
                accepted = uniforms[:, depth, rank] * drawn_with < residual[rows, token]
                taken = open_ & accepted & (drawn_with > 0)
                leaf = torch.where(taken, child, leaf)
                residual_at_leaf = torch.where(
                    taken[:, None], target_probs[:, child], residual_at_leaf
                )
                open_ = open_ & ~taken
                residual, proposal = after_rejection(residual, proposal, token)
            residual_at_leaf = torch.where(open_[:, None], residual, residual_at_leaf)
    last = gumbel[rows, tree.depths[leaf]]
    bonus = (residual_at_leaf.log() + last).argmax(dim=-1)
    verdict = verdict_of(tree, leaf, tokens)
    # ``tokens`` at the path are the accepted tokens, root first; shift them up and add the bonus.
    emitted = torch.roll(verdict.tokens, -1, dims=1)
    emitted = emitted.scatter(1, verdict.accepted[:, None], bonus[:, None])
    return Verdict(verdict.accepted, verdict.path, emitted)


def after_rejection(residual: Tensor, proposal: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """The target's residual and the remaining draft distribution, [B, V] each.

    If rounding leaves no residual mass the target lies under the draft everywhere: it keeps its
    distribution, an event of probability zero in exact arithmetic.
    """
    left = (residual - proposal).clamp_min(0)
    mass = left.sum(dim=-1, keepdim=True)
    left = torch.where(mass > 0, left / mass, residual)
    remaining = proposal.scatter(-1, token[:, None], 0.0)
    total = remaining.sum(dim=-1, keepdim=True)
    return left, torch.where(total > 0, remaining / total, remaining)
