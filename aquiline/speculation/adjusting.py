"""The adjustments of a round: of the draft's logits level by level, of the target's at every node.

A node's history holds the tokens on its path, so each node is adjusted as plain decoding would be
there. Exactness rests on the target's side alone: the draft's is for acceptance, and both rules
take the draft's adjusted logits for what its children were drawn from.
"""

from __future__ import annotations

from torch import Tensor

from aquiline.kernels import ops
from aquiline.speculation.drafting import DraftedLevel
from aquiline.speculation.verification.noise import RoundNoise
from aquiline.speculation.verification.verdict import Verdict


def adjust_draft(
    round_: RoundNoise, logits: Tensor, above: DraftedLevel | None, masks: Tensor | None = None
) -> None:
    """Logits [B, E, Vd] of the expanded nodes of a level (None: of the root), in place; ``masks``
    of the root, see ops.adjust_logits."""
    sampling, tree = round_.sampling, round_.tree
    if sampling.adjustments is None:
        return
    depth = 0 if above is None else above.depth
    history = None
    if above is not None:
        history = ops.History(above.drafted, tree.ancestors, tree.expanded_nodes[depth])
    ops.adjust_logits(
        logits, sampling.adjustments, sampling.slots, round_.positions,
        tree.expanded_depths[depth], history, round_.draft_ids,
        masks if above is None else None, None,
    )  # fmt: skip


def adjust_target(
    round_: RoundNoise, logits: Tensor, tokens: Tensor, masks: Tensor | None = None
) -> Tensor | None:
    """Logits [B, N, V] after the nodes, tokens [B, N], in place, ``masks`` as in ops.adjust_logits;
    returns them raw for ``settle``: None if nobody wants log-probabilities."""
    sampling, tree = round_.sampling, round_.tree
    if sampling.adjustments is None:
        return None
    raw = logits.new_empty(logits.shape) if sampling.logprobs else None
    history = None if tree.shape.size == 1 else ops.History(tokens, tree.ancestors, None)
    ops.adjust_logits(
        logits, sampling.adjustments, sampling.slots, round_.positions, tree.depths, history,
        None, masks, raw,
    )  # fmt: skip
    return raw


def settle(
    round_: RoundNoise, logits: Tensor, raw: Tensor | None, verdict: Verdict
) -> Tensor | None:
    """Count what was said; its log-probabilities [B, D + 1, ops.LOGPROB_COLUMNS], if wanted."""
    sampling = round_.sampling
    if sampling.adjustments is None:
        return None
    table, slots = sampling.adjustments, sampling.slots
    ops.count_tokens(table, slots, verdict.tokens, verdict.accepted + 1)
    if raw is None:
        return None
    return ops.token_logprobs(logits, raw, table, slots, verdict.path, verdict.tokens)
