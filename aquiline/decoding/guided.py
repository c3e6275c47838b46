"""GuidedRound: a round of texts of which some have a form; the host makes the masks.

    device   draft stage --+-- verify stage (the target's forward) --+-- accept stage
             (roots)       | tokens [B, N] to pinned memory          | waits for masks [B, N, words]
    host     roots         +-- masks of every node, sent beside -----+

The masks after the roots, which filter their children, are there before the draft runs, so the host
must have read what the round before emitted. The device waits for that as long as a few tokens take
to advance over, and every root's child is one that the form allows. The masks after the nodes are
made while the target runs. On CUDA each stage is a graph, and the masks go to a fixed address on a
stream of their own for which the accept stage waits; on the CPU the same stages run in turn.
"""

from __future__ import annotations

from typing import Any

import torch

from aquiline.decoding.graph import capture
from aquiline.decoding.rows import Emitted, StagedRound
from aquiline.guided.batch import GuidedBatch


class GuidedRound:
    """A round of fixed rows and tree; captured on CUDA, where it must be harmless to run once.

    Args:
        pool: see RoundGraph.
    """

    def __init__(self, stages: StagedRound, pool: Any = None) -> None:
        self._masks, self._tree = stages.masks, stages.tree.shape
        self._draft, self._verify, self._accept = stages.draft, stages.verify, stages.accept
        self._cuda = stages.masks.nodes.is_cuda
        if self._cuda:
            draft, verify, accept = capture(stages.draft, stages.verify, stages.accept, pool=pool)
            self._draft, self._verify, self._accept = draft.replay, verify.replay, accept.replay
            self._drafted = torch.empty_like(draft.result, device="cpu", pin_memory=True)
            self._beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def run(self, forms: GuidedBatch) -> Emitted:
        """One round; every matcher has advanced over what the round before emitted."""
        roots = forms.roots(pinned=self._cuda)
        self._masks.roots.copy_(roots, non_blocking=True)
        tokens = self._draft()
        if not self._cuda:
            self._verify()
            self._masks.nodes.copy_(forms.masks(self._tree, tokens))
            return self._accept()
        self._drafted.copy_(tokens, non_blocking=True)
        there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        there.record()
        self._verify()
        there.synchronize()
        masks = forms.masks(self._tree, self._drafted, pinned=True)
        with torch.cuda.stream(self._beside):
            self._masks.nodes.copy_(masks, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._beside)
        return self._accept()
