"""The coupled rule: one draw per node, follow the children that match (the default).

The token after every node is drawn from the target with noise keyed by (seed, choice, position). A
child is accepted exactly if it is the token that was drawn, so the text is what plain decoding
with the same noise would have said, whatever was proposed: the proposal decides only how fast.
Proof: docs/losslessness.md. Loop-free: a node counts if all its ancestors matched.
"""

from __future__ import annotations

from torch import Tensor

from aquiline.kernels import ops
from aquiline.sampling.draw import draw, draw_top, position_noise
from aquiline.speculation.tree import TreeTables
from aquiline.speculation.verification.noise import RoundNoise
from aquiline.speculation.verification.verdict import Verdict


class Coupled:
    """The rule for one round of a batch, see ``rules.Rule``."""

    any_proposal = True

    def __init__(self, round_: RoundNoise) -> None:
        self.round = round_
        self._noise = position_noise(round_.sampling, round_.positions, round_.vocab)
        self._proposal_noise = self.proposal_noise(round_, self._noise)

    @staticmethod
    def proposal_noise(round_: RoundNoise, drawing: ops.NoiseKey | None) -> ops.NoiseKey | None:
        """What ranks the children beside the draft's opinion: the noise of the drawing itself."""
        return drawing

    def propose(self, logits: Tensor, depth: int, count: int) -> Tensor:
        """The best of log draft_probs + the noise of the coming draw: likely winners first."""
        round_ = self.round
        levels = round_.tree.expanded_depths[depth - 1]
        return draw_top(
            logits, round_.sampling, self._proposal_noise, levels, round_.draft_ids, count
        )

    def accept(self, tokens: Tensor, logits: Tensor) -> Verdict:
        tree = self.round.tree
        drawn = draw(logits, self.round.sampling, self._noise, tree.depths)
        return accept(tree, tokens, drawn)


def accept(tree: TreeTables, tokens: Tensor, drawn: Tensor) -> Verdict:
    """Follow matching children from the root.

    Args:
        tokens: [B, N] the token at each node; siblings differ, but a retrieved one may say what a
            drafted one says: the deeper of the two paths counts.
        drawn: [B, N] the token drawn from the target after each node.
    """
    return Verdict(*ops.follow_matches(tokens, drawn, tree.parents, tree.ancestors, tree.routes))
