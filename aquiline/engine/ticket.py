"""Ticket: a step's work in flight, and what it said once it is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.core.outputs import VerifiedTree
from aquiline.decoding.rows import Emitted
from aquiline.engine.scores import TokenScores
from aquiline.engine.sequence import Sequence, StepTokens
from aquiline.speculation.tree import TreeShape


@dataclass(frozen=True)
class Ticket:
    """Work in flight.

    Attributes:
        sequences: with the epoch each had at launch; one that was preempted since is not served.
        emitted: in host memory, see decoding.rows; a prefill accepted -1. Log-probabilities are
            there if a sequence wants them.
        prompts: [T - 1, C] in host memory by place in ``sequences``: log-probabilities of the
            tokens of its prompt from the second on, see ops.token_logprobs.
        tree: what was verified; None for a prefill.
        done: on CUDA, recorded behind the copies to the host.
    """

    sequences: tuple[tuple[Sequence, int], ...]
    emitted: Emitted
    prompts: Mapping[int, Tensor]
    tree: TreeShape | None
    done: torch.cuda.Event | None

    def said(self) -> Iterator[tuple[int, Sequence, tuple[int, ...]]]:
        """Wait; place, sequence and tokens of those that still want them."""
        if self.done is not None:
            self.done.synchronize()
        rows = zip(self.sequences, self.emitted.tokens.tolist(), strict=False)
        for place, ((sequence, epoch), (accepted, *tokens)) in enumerate(rows):
            if sequence.epoch == epoch:  # a prefill drew one token, and accepted -1
                yield place, sequence, tuple(tokens[: max(accepted, 0) + 1])

    def collect(self) -> Iterator[StepTokens]:
        """Wait, and commit what was done for the sequences that still want it."""
        shape = self.tree
        tree = None if shape is None else VerifiedTree(shape.paths, shape.retrieved)
        for place, sequence, said in self.said():
            accepted = len(said) - 1
            if self.tree is None:  # the prompt is committed
                sequence.arrived(0)
            else:
                sequence.arrived(self.tree.depth + 1)
                sequence.committed(accepted + 1)
                sequence.record_round(accepted, self.tree.size - 1, self.tree.depth)
            depths = (*range(1, accepted + 1), 0)
            scores, prompt = self._scores(sequence, place, said), self._prompt(sequence, place)
            yield StepTokens(sequence, said, depths, tree, scores, prompt)

    def _scores(
        self, sequence: Sequence, place: int, said: tuple[int, ...]
    ) -> tuple[TokenScores, ...]:
        count, logprobs = sequence.request.params.logprobs, self.emitted.logprobs
        if count is None:
            return ()
        assert logprobs is not None
        return _scored(said, logprobs[place], count)

    def _prompt(self, sequence: Sequence, place: int) -> tuple[TokenScores, ...] | None:
        count = sequence.request.params.prompt_logprobs
        if count is None or place not in self.prompts:
            return None
        return _scored(sequence.request.prompt_token_ids[1:], self.prompts[place], count)


def _scored(tokens: Iterable[int], rows: Tensor, count: int) -> tuple[TokenScores, ...]:
    """Of each token, from rows [>= L, C]."""
    columns = zip(tokens, rows.tolist(), strict=False)
    return tuple(TokenScores.of(token, row, count) for token, row in columns)
