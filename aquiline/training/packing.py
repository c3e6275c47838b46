"""Packed batches: whole documents side by side in one row of fixed length.

A batch is a function of (corpus, seed, step) alone, so to resume a run its step number is enough.
Every epoch shuffles the training documents and drops each into the fullest of a few open packs
that still has room; each document is in exactly one pack of the epoch. What stays empty is one more
document that no loss sees. The hold-out is the same for every seed, so that runs can be compared.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np
import torch

from aquiline.core.errors import DataError
from aquiline.training.corpus import Corpus

_HOLDOUT_SEED = 0x5EED
_OPEN_PACKS = 16


@dataclass(frozen=True)
class PackedBatch:
    """N tokens of several documents.

    Attributes:
        tokens: [N] int64; padding is 0.
        loss_mask: [N] bool, true where token i is the assistant's; false in padding.
        positions: [N] int64, from 0 in every document; 0 all through the padding.
        cu_seqlens: [documents + 1] int32, starts of the documents and N; padding is a document.
        max_seqlen: length of the longest document, padding included.
        epoch: epochs of the corpus read before this batch.
    """

    tokens: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    epoch: float


class Packer:
    """An endless sequence of packed batches over a corpus, addressed by step.

    Args:
        corpus: no document may be longer than a batch.
        tokens_per_batch: N, the length of every batch of one rank.
        seed: of the order of documents.
        holdout: how many documents are kept out of training.

    Raises:
        DataError: a document is longer than a batch, or the hold-out leaves nothing to train on.
    """

    def __init__(self, corpus: Corpus, tokens_per_batch: int, seed: int, holdout: int) -> None:
        if not 0 <= holdout < len(corpus):
            raise DataError(f"holdout={holdout}: give 0 to {len(corpus) - 1}, fewer than documents")
        longest = int(corpus.lengths.max())
        if longest > tokens_per_batch:
            raise DataError(
                f"tokens_per_batch={tokens_per_batch}: a document has {longest} tokens; raise it "
                f"or build the corpus with max_length={tokens_per_batch}"
            )
        self.corpus = corpus
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        order = np.random.default_rng(_HOLDOUT_SEED).permutation(len(corpus))
        split = len(corpus) - holdout
        self._training, self._held_out = order[:split], order[split:]
        self._ends: list[int] = []  # packs in the epochs up to and including each
        self._plan: tuple[int, list[list[int]]] = (0, self._pack(0))
        self._ends.append(len(self._plan[1]))

    def batch(self, step: int, rank: int = 0, world: int = 1) -> PackedBatch:
        """The batch of one rank at one step; the ranks of a step read different packs."""
        return self._assemble(*self._find(step * world + rank))

    def documents(self, number: int) -> list[int]:
        """Indices in the corpus of the documents of one batch of a single rank."""
        return self._find(number)[0]

    def _find(self, number: int) -> tuple[list[int], float]:
        """The pack of a batch, and the epochs read before it."""
        epoch = 0
        while number >= self._epoch_end(epoch):
            epoch += 1
        if self._plan[0] != epoch:
            self._plan = (epoch, self._pack(epoch))
        packs = self._plan[1]
        index = number - (self._ends[epoch] - len(packs))
        return packs[index], epoch + index / len(packs)

    def held_out(self) -> list[int]:
        """Indices in the corpus of the documents that no batch contains."""
        return [int(index) for index in self._held_out]

    def held_out_prompts(self, count: int, max_prompt: int) -> list[list[int]]:
        """Contexts of held-out documents up to and including the first generation prompt.

        The first ``count`` of at most ``max_prompt`` tokens; fewer if there are not as many.
        """
        prompts: list[list[int]] = []
        for index in self.held_out():
            if len(prompts) == count:
                break
            ids, mask = self.corpus.document(index)
            start = int(mask.argmax())
            if start <= max_prompt:
                prompts.append(ids[:start].tolist())
        return prompts

    def _epoch_end(self, epoch: int) -> int:
        if epoch == len(self._ends):
            self._plan = (epoch, self._pack(epoch))
            self._ends.append(self._ends[-1] + len(self._plan[1]))
        return self._ends[epoch]

    def _pack(self, epoch: int) -> list[list[int]]:
        """The packs of one epoch as lists of document indices."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self._training)
        packs: list[list[int]] = []
        rooms: list[int] = []  # of the open packs, fullest first, beside their documents
        contents: list[list[int]] = []
        for index, length in zip(order.tolist(), self.corpus.lengths[order].tolist(), strict=True):
            slot = bisect_left(rooms, length)
            if slot < len(rooms):
                room, documents = rooms.pop(slot), contents.pop(slot)
            else:
                room, documents = self.tokens_per_batch, []
                if len(rooms) == _OPEN_PACKS:
                    del rooms[0]
                    packs.append(contents.pop(0))
            documents.append(index)
            slot = bisect_right(rooms, room - length)
            rooms.insert(slot, room - length)
            contents.insert(slot, documents)
        return packs + contents

    def _assemble(self, pack: list[int], epoch: float) -> PackedBatch:
        documents = [self.corpus.document(index) for index in pack]
        lengths = [len(ids) for ids, _ in documents]
        padding = self.tokens_per_batch - sum(lengths)
        if padding:
            documents.append((np.zeros(padding, np.int64), np.zeros(padding, np.bool_)))
            lengths.append(padding)
        return PackedBatch(
            tokens=torch.from_numpy(np.concatenate([ids for ids, _ in documents])),
            loss_mask=torch.from_numpy(np.concatenate([mask for _, mask in documents])),
            positions=torch.cat(
                [*map(torch.arange, lengths[: len(pack)]), torch.zeros(padding)]
            ).long(),
            cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
            max_seqlen=max(lengths),
            epoch=epoch,
        )
