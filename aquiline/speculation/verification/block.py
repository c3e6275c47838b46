"""Block verification (Sun et al., 2403.10444), a baseline: a chain is judged as a whole.

After i draft tokens x_1 .. x_i let P and Q be the target's and the draft's distribution of the
next, and

    w_0 = 1,   w_i = min(1, w_(i-1) P(x_i) / Q(x_i)),   R_i = max(0, w_i P - Q),
    h_i = sum R_i / (sum R_i + 1 - w_i)        (Q = 0 after the last node, so there h_i = w_i).

Node i passes with probability h_i; the deepest that passes is the leaf, whatever failed above it,
and the bonus token is drawn from R at the leaf. Like multi-round it is exact, and it accepts at
least as much of a chain. Plain torch, batched: it exists to be measured against.

Where a round ends depends on nodes *below* the leaf, hence on noise of positions that the next
round decides again. So its noise is keyed by the round's start and the depth, never by the position
alone (docs/losslessness.md).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from aquiline.core.errors import AquilineError
from aquiline.kernels import ops
from aquiline.sampling.filters import probabilities
from aquiline.speculation.verification.multi_round import MultiRound, draft_columns, verdict_at
from aquiline.speculation.verification.noise import RoundNoise
from aquiline.speculation.verification.verdict import Verdict

DEPTHS = 128  # above MAX_CHAIN; a key has 32 bits, so starts up to 2^25 have keys of their own


class Block(MultiRound):
    """The rule for one round of a batch; children are drawn as under multi-round."""

    def __init__(self, round_: RoundNoise) -> None:
        shape = round_.tree.shape
        if not shape.is_chain:
            raise AquilineError(
                "verification='block': it judges chains and this tree branches; give "
                "num_speculative_tokens or tree='chain-N'"
            )
        super().__init__(replace(round_, positions=round_keys(round_)))

    def accept(self, tokens: Tensor, logits: Tensor) -> Verdict:
        round_ = self.round
        drafted = torch.cat(self._draft_logits or [logits[:, :0]], dim=1)
        draft_probs = probabilities(drafted, round_.sampling)
        columns = draft_columns(round_)
        if columns is not None:
            draft_probs = draft_probs[..., columns.clamp_min(0)] * (columns >= 0)
        return accept(round_, tokens, probabilities(logits, round_.sampling), draft_probs)


def round_keys(round_: RoundNoise) -> Tensor:
    """[B, D + 1] what names the noise of each depth: no other round has the same."""
    return round_.positions[:, :1] * DEPTHS + round_.tree.steps


def accept(
    round_: RoundNoise, tokens: Tensor, target_probs: Tensor, draft_probs: Tensor
) -> Verdict:
    """The deepest node that passes, and a token from its residual.

    Args:
        tokens: [B, D + 1] along the chain, the root first.
        target_probs: [B, D + 1, V] after each node.
        draft_probs: [B, D, V] that each node's child was drawn from.
    """
    chosen = tokens[:, 1:, None]
    # x / 0 can only be a greedy tie that two argmaxes broke differently: inf passes, NaN does not.
    ratios = target_probs[:, :-1].gather(-1, chosen) / draft_probs.gather(-1, chosen)
    weights = target_probs.new_ones(len(tokens), 1)
    for depth in range(ratios.shape[1]):
        weights = torch.cat((weights, (weights[:, -1:] * ratios[:, depth]).clamp(max=1)), dim=1)
    residual = residual_of(weights, target_probs, F.pad(draft_probs, (0, 0, 0, 1)))
    mass = residual.sum(dim=-1)
    uniforms = round_.key(ops.Stream.ACCEPT).uniforms(1).squeeze(-1)
    passes = uniforms < mass / (mass + 1 - weights)  # 0 / 0, where P = Q, leaves it to the child
    leaf = (passes * round_.tree.depths).amax(dim=1)
    return verdict_at(round_.tree, tokens, leaf, _bonus(round_, leaf, residual, target_probs))


def residual_of(weights: Tensor, target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """[B, N, V], not normalised: what the draft leaves of a node's weight [B, N] in the target."""
    return (weights[..., None] * target_probs - draft_probs).clamp_min(0)


def _bonus(round_: RoundNoise, leaf: Tensor, residual: Tensor, target_probs: Tensor) -> Tensor:
    """[B] drawn from the leaf's residual; from its target where rounding left no residual."""
    rows = leaf[:, None, None].expand(-1, 1, residual.shape[-1])
    left, target = residual.gather(1, rows), target_probs.gather(1, rows)
    scores = torch.where(left.sum(dim=-1, keepdim=True) > 0, left, target).log()
    key = round_.key(ops.Stream.RESIDUAL)
    key = replace(key, positions=key.positions.gather(1, leaf[:, None]))
    one = torch.ones_like(round_.sampling.temperature)
    return ops.draw_top(scores, None, one, key, None, None, 1)[:, 0, 0]
