"""One decoding round: draft a tree, verify it in one target forward, commit the accepted path.

    pending pairs --> draft --> scores --> level 1 --> draft --> ... level D
                       (re-sync and first step in one pass)            |
    emitted tokens <-- accept <-- target over the tree <---------------+

Logits of draft and target are adjusted (penalties, bias, bans) before the rule sees them.

A round has three stages, so that the host can look at the drafted tokens while the target runs and
say what the forms of texts allow after each (decoding/guided.py). Without forms they are one.

Slots past a request's length n hold the tree: node i of the target at n + i, node i of the draft at
n + i - 1 (the draft has no root node: its pairs end at position n - 1). Written once, run eagerly;
nothing here reads a tensor on the host except where the CPU trims padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.attention.paged import PagedAttention, TreePlan
from aquiline.decoding.models import DecoderModels, Drafter, Planes
from aquiline.decoding.state import DecodeState
from aquiline.kernels import ops
from aquiline.kvcache.pool import KVPlane, TokenPlane
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.adjusting import adjust_draft, adjust_target, settle
from aquiline.speculation.drafting import DraftedLevel, grow
from aquiline.speculation.tree import TreeTables
from aquiline.speculation.verification.noise import RoundNoise
from aquiline.speculation.verification.rules import Rule, RuleFactory
from aquiline.speculation.verification.verdict import Verdict

NGRAMS = 3, 2  # longest and shortest run of tokens that is looked up


@dataclass(frozen=True)
class RoundResult:
    """The verdict and the state that the next round starts from.

    ``logprobs`` are of the verdict's tokens, see ops.token_logprobs; None if nobody wants them.
    """

    verdict: Verdict
    state: DecodeState
    logprobs: Tensor | None


class Round:
    """One round of a batch: ``draft``, ``verify`` and ``accept`` once each, in this order; ``run``
    is all three, for texts that may have any form.

    Args:
        page_table: [B, M]; every request owns slots for ``tree.shape.size`` tokens past its length.
        state: see DecodeState; not modified.
    """

    def __init__(
        self,
        models: DecoderModels,
        planes: Planes,
        tree: TreeTables,
        rule_factory: RuleFactory,
        page_table: Tensor,
        state: DecodeState,
        sampling: SamplingBatch,
    ) -> None:
        self.models, self.planes, self.tree = models, planes, tree
        self.page_table, self.state = page_table, state
        after = state.lengths[:, None] + tree.steps
        drafter = models.drafter
        draft_ids = None if drafter is None else drafter.head.token_ids
        self.round = RoundNoise(tree, sampling, after, models.target.config.vocab_size, draft_ids)
        self.rule = rule_factory(self.round)
        self.tokens = state.roots[:, None]

    def draft(self, roots: Tensor | None = None, foreseen: Tensor | None = None) -> Tensor:
        """Tokens [B, N] of the tree.

        Args:
            roots: [B, 1, words] the masks of its root, see ops.adjust_logits.
            foreseen: [B, D] see grow; not used where the rule judges its own proposals alone.
        """
        drafter, plane, tree = self.models.drafter, self.planes.draft, self.tree
        if drafter is not None and plane is not None:
            drafting = _Drafting(
                drafter, plane, self.round, self.rule, self.page_table, self.state, roots
            )
            if not tree.levels:  # plain for now: the draft keeps up, for the round that drafts
                drafting.resync()
            else:
                self.tokens = grow(
                    tree, self.state.roots, drafting.propose, drafter.head.to_target,
                    foreseen if self.rule.any_proposal else None,
                )  # fmt: skip
        if self.planes.tokens is not None:
            found = _retrieve(self.planes.tokens, tree, self.page_table, self.state)
            self.tokens = torch.cat((self.tokens, found), dim=1)
        return self.tokens

    def verify(self) -> None:
        """The target over the whole tree."""
        self.features, self.logits = _verify(
            self.models, self.planes.target, self.tree, self.page_table, self.state.lengths,
            self.tokens,
        )  # fmt: skip

    def accept(self, masks: Tensor | None = None) -> RoundResult:
        """What is emitted; ``masks`` [B, N, words] of every node, see ops.adjust_logits."""
        lengths = self.state.lengths
        raw = adjust_target(self.round, self.logits, self.tokens, masks)
        verdict = self.rule.accept(self.tokens, self.logits)
        logprobs = settle(self.round, self.logits, raw, verdict)
        _commit_path(self.planes.target, self.tree, self.page_table, lengths, verdict)
        return RoundResult(verdict, _next_state(lengths, self.features, verdict), logprobs)

    @torch.inference_mode()
    def run(self) -> RoundResult:
        """The whole round."""
        self.draft()
        self.verify()
        return self.accept()


def _retrieve(
    plane: TokenPlane, tree: TreeTables, page_table: Tensor, state: DecodeState
) -> Tensor:
    """Write what was said since the last round; the tokens of the retrieved chain, [B, R]."""
    ends, width = state.lengths + 1, state.room
    said = ops.pending_rows(page_table, ends, state.pending_counts, width, plane.page_size)
    plane.write(said.slots, state.pending_tokens)
    count = tree.shape.retrieved
    if count == 0:
        return state.pending_tokens[:, :0]
    lengths, size = state.lengths, plane.page_size
    return ops.ngram_match(plane.data, page_table, size, lengths, *NGRAMS, count)


def _verify(
    models: DecoderModels,
    plane: KVPlane,
    tree: TreeTables,
    page_table: Tensor,
    lengths: Tensor,
    tokens: Tensor,
) -> tuple[Tensor, Tensor]:
    """The target over the whole tree: what the draft reads of it, and raw logits [B, N, V]."""
    slots = ops.slots_at(page_table, lengths[:, None] + tree.nodes, plane.page_size)
    if tree.shape.size == 1:
        plan = TreePlan(page_table, lengths + 1, slots, 0)
    else:
        plan = TreePlan(page_table, lengths, slots, tree.shape.size, tree.ancestors)
    positions = lengths[:, None] + tree.depths
    output = models.target(tokens, positions, PagedAttention(plane, plan), models.taps)
    return models.draft_features(output), models.target.logits(output.features)


def _commit_path(
    plane: KVPlane, tree: TreeTables, page_table: Tensor, lengths: Tensor, verdict: Verdict
) -> None:
    """Move the accepted nodes' keys to where plain decoding would have put them.

    Nodes past ``accepted`` are moved too, into room that the next round overwrites. The nodes of a
    chain are already in place.
    """
    if tree.shape.is_chain:
        return
    start = lengths[:, None]
    source = ops.slots_at(page_table, start + verdict.path[:, 1:], plane.page_size)
    target = ops.slots_at(page_table, start + tree.steps[:-1], plane.page_size)
    plane.commit_path(source, target)


def _next_state(lengths: Tensor, features: Tensor, verdict: Verdict) -> DecodeState:
    """Accepted nodes and the bonus token become pending pairs; the bonus token is the new root."""
    counts = verdict.accepted + 1
    index = verdict.path[:, :, None].expand(-1, -1, features.shape[-1])
    return DecodeState(
        lengths=lengths + counts,
        roots=verdict.tokens.gather(1, verdict.accepted[:, None]).squeeze(1),
        pending_tokens=verdict.tokens,
        pending_features=features.gather(1, index),
        pending_counts=counts,
    )


class _Drafting:
    """The draft's passes of one round: re-sync plus first step, then one pass per level."""

    def __init__(
        self,
        drafter: Drafter,
        plane: KVPlane,
        round_: RoundNoise,
        rule: Rule,
        page_table: Tensor,
        state: DecodeState,
        roots: Tensor | None,
    ) -> None:
        self.drafter, self.plane, self.tree = drafter, plane, round_.tree
        self.round, self.rule, self.page_table, self.state = round_, rule, page_table, state
        self._roots = roots
        self._features = state.pending_features[:, :1]  # [B, E, d] of the last pass

    def propose(self, above: DraftedLevel | None, count: int) -> Tensor:
        if above is None:
            self._features = self.resync()
            depth = 1
        else:
            self._features = self._expand(above)
            depth = above.depth + 1
        logits = self.drafter.logits(self._features)
        adjust_draft(self.round, logits, above, self._roots)
        return self.rule.propose(logits, depth, count)

    def _run(self, tokens: Tensor, features: Tensor, positions: Tensor, plan: TreePlan) -> Tensor:
        embeddings = self.drafter.embed(tokens)
        attention = PagedAttention(self.plane, plan)
        hidden: Tensor = self.drafter.draft(embeddings, features, positions, attention)
        return hidden

    def resync(self) -> Tensor:
        """Feed the pending pairs; the last one's prediction [B, 1, d] is the root's.

        Padding rows (past a request's count) write to the dustbin. The CPU trims them.
        """
        state = self.state
        width = state.room
        if state.lengths.device.type == "cpu":
            width = int(state.pending_counts.max())
        start, positions, slots = ops.pending_rows(
            self.page_table, state.lengths, state.pending_counts, width, self.plane.page_size
        )
        if width == 1:
            plan = TreePlan(self.page_table, start + 1, slots, 0)
        else:
            plan = TreePlan(self.page_table, start, slots, width)
        tokens, features = state.pending_tokens[:, :width], state.pending_features[:, :width]
        hidden = self._run(tokens, self.drafter.draft.fuse(features), positions, plan)
        last = (state.pending_counts - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return hidden.gather(1, last)

    def _expand(self, above: DraftedLevel) -> Tensor:
        """Feed the expanded nodes of a level, with the features their parents predicted."""
        tree, lengths, depth = self.tree, self.state.lengths, above.depth
        nodes = tree.expanded_nodes[depth]
        level, features = above.level, self._features
        if not level.only_children:
            features = features[:, level.sources]
        positions = (lengths + (depth - 1))[:, None].expand(-1, len(nodes))
        page_table, page_size = self.page_table, self.plane.page_size
        if tree.shape.drafts_chain:  # what it sees is contiguous
            slots = ops.slots_at(page_table, positions, page_size)
            plan = TreePlan(page_table, lengths + depth, slots, 0)
        else:  # every node so far, root aside; those never fed to the draft are nobody's ancestors
            last = tree.last_expanded[depth]
            mask = tree.ancestors[nodes, 1 : last + 1]
            slots = ops.slots_at(page_table, lengths[:, None] + (nodes - 1), page_size)
            plan = TreePlan(page_table, lengths, slots, last, mask)
        return self._run(above.expanded_tokens, features, positions, plan)
