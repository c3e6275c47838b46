"""GuidedRound: a round of texts of which some have a form; the host makes the masks.

    device           draft stage --+-- verify stage (the target's forward) --+-- accept stage
                                   | tokens [B, N] to pinned memory          | waits for masks
    host   of roots: masks,        +-- masks of every node, sent beside -----+
           what is foreseen

What is known of the roots is there before the draft runs: the masks filter their children, and
characters that the form leaves no choice of become nodes in place of the draft's guess. So the host
must have read what the round before emitted, and the device waits while it does; what that costs in
microseconds, the nodes gain in tokens. The masks after the nodes are made while the target runs. On
CUDA each stage is a graph, and the masks go to a fixed address on a stream of their own for which
the accept stage waits; on the CPU the same stages run in turn.
"""

from __future__ import annotations

from typing import Any

import torch

from aquiline.decoding.graph import capture
from aquiline.decoding.rows import Emitted, StagedRound
from aquiline.guided.batch import GuidedBatch

STAGES = 3  # graphs of a round


class GuidedRound:
    """A round of fixed rows and tree; captured on CUDA, where it must be harmless to run once.

    Args:
        pool: see RoundGraph.
    """

    def __init__(self, stages: StagedRound, pool: Any = None) -> None:
        self._forms, self._tree = stages.forms, stages.tree.shape
        self._draft, self._verify, self._accept = stages.draft, stages.verify, stages.accept
        self._cuda = stages.forms.nodes.is_cuda
        if self._cuda:
            draft, verify, accept = capture(stages.draft, stages.verify, stages.accept, pool=pool)
            self._draft, self._verify, self._accept = draft.replay, verify.replay, accept.replay
            self._drafted = torch.empty_like(draft.result, device="cpu", pin_memory=True)
            self._beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def run(self, batch: GuidedBatch) -> Emitted:
        """One round; every matcher has advanced over what the round before emitted."""
        forms, tree, cuda = self._forms, self._tree, self._cuda
        forms.roots.copy_(batch.roots(pinned=cuda), non_blocking=True)
        forms.foreseen.copy_(batch.foreseen(tree.depth, pinned=cuda), non_blocking=True)
        tokens = self._draft()
        if not cuda:
            self._verify()
            forms.nodes.copy_(batch.masks(tree, tokens))
            return self._accept()
        self._drafted.copy_(tokens, non_blocking=True)
        there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        there.record()
        self._verify()
        there.synchronize()
        masks = batch.masks(tree, self._drafted, pinned=True)
        with torch.cuda.stream(self._beside):
            forms.nodes.copy_(masks, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._beside)
        return self._accept()
