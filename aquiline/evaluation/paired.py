"""Paired evaluation: how a draft fares on given texts, without decoding.

Under the coupled rule the text is a function of (target, prompt, seed, temperature) alone, so every
draft and every tree meets the same text. Whether the true token is the draft's first child, second
or none, at each depth below each token, says what a decoder would have accepted in any static tree:

    root at position a:  depth 1 reads (x_a, h_{a-1})           ranks x_{a+1}
                         depth d reads (x_{a+d-1}, its own d-1)  ranks x_{a+d}

On the accepted path drafted tokens are the text's, so forcing them is exact. All roots of a batch
of texts are drafted at once, depth by depth; walk.py turns the ranks into rounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from aquiline.attention.packed import PackedAttention
from aquiline.attention.unrolled import UnrolledAttention
from aquiline.core.errors import AquilineError
from aquiline.core.params import SamplingParams
from aquiline.decoding.models import DecoderModels, Drafter
from aquiline.evaluation.texts import FixedText
from aquiline.sampling.batch import SamplingBatch
from aquiline.sampling.draw import draw_top, position_noise

WIDTH = 8  # children that are ranked
_BATCH_TOKENS = {"cuda": 32768}  # of a packed row
_LOGITS = {"cuda": 2**28}  # entries at a time
_CPU_BATCH_TOKENS, _CPU_LOGITS = 4096, 2**23


@torch.inference_mode()
def token_ranks(
    models: DecoderModels,
    texts: Sequence[FixedText],
    temperature: float,
    depth: int,
    width: int = WIDTH,
) -> list[Tensor]:
    """Of each text [roots, depth] int64: the true token's place among the children that the draft
    would propose at depth 1, 2, ... below each root, given the true path; ``width``: not there.

    ``temperature`` and the texts' seeds must be those that the texts were drawn with; no filters.

    Raises:
        AquilineError: there is no draft, or ``depth`` or ``width`` is not positive.
    """
    drafter = models.drafter
    if drafter is None:
        raise AquilineError("models: there is no draft to rank by; give a drafter")
    if depth < 1 or width < 1:
        raise AquilineError(f"depth={depth}, width={width}: give positive numbers")
    ranks = [torch.empty(0, depth, dtype=torch.int64)] * len(texts)
    limit = _BATCH_TOKENS.get(models.device.type, _CPU_BATCH_TOKENS)
    for members in _batches(texts, limit):
        found = _Batch(models, drafter, [texts[i] for i in members], temperature)
        roots = [texts[index].roots for index in members]
        for index, one in zip(
            members, torch.split(found.ranks(depth, width).cpu(), roots), strict=True
        ):
            ranks[index] = one
    return ranks


def _batches(texts: Sequence[FixedText], limit: int) -> Iterator[list[int]]:
    """Indices of texts that fill ``limit`` tokens; texts without a root are left out."""
    batch: list[int] = []
    room = limit
    for index, text in enumerate(texts):
        if not text.roots:
            continue
        size = len(text.prompt) + len(text.tokens)
        if batch and size > room:
            yield batch
            batch, room = [], limit
        batch.append(index)
        room -= size
    if batch:
        yield batch


class _Batch:
    """Texts packed in one row of N tokens; R roots in all.

    Row i of N is the pair (token i + 1, feature i): the one before root i + 1.
    """

    def __init__(
        self, models: DecoderModels, drafter: Drafter, texts: Sequence[FixedText],
        temperature: float,
    ) -> None:  # fmt: skip
        self.models, self.drafter, device = models, drafter, models.device
        sizes = [len(text.prompt) + len(text.tokens) for text in texts]
        edges = list(itertools.accumulate(sizes, initial=0))
        self.edges, self.longest = torch.tensor(edges, device=device, dtype=torch.int32), max(sizes)
        self.tokens = torch.tensor([t for text in texts for t in (*text.prompt, *text.tokens)],
                                   device=device)  # fmt: skip
        self.positions = torch.cat([torch.arange(size, device=device) for size in sizes])
        firsts = [edge + len(text.prompt) - 1 for edge, text in zip(edges, texts, strict=False)]
        counts = [text.roots for text in texts]
        rows = [torch.arange(f, f + n) for f, n in zip(firsts, counts, strict=True)]
        owners = torch.arange(len(texts)).repeat_interleave(torch.tensor(counts)).to(device)
        self.rows, self.ends = torch.cat(rows).to(device), self.edges[1:][owners]  # [R]
        params = [SamplingParams(temperature=temperature)] * len(texts)
        sampling = SamplingBatch.of(params, [text.seed for text in texts], device)
        self.sampling = sampling.select(owners)  # [R]

    def ranks(self, depth: int, width: int) -> Tensor:
        """[R, depth]."""
        draft, found = self.drafter.draft, []
        attention = UnrolledAttention(self.edges, self.longest)
        hidden = draft.fuse(self._features())
        every = torch.arange(len(self.tokens), device=self.tokens.device)
        for step in range(depth):
            embedded = self.drafter.embed(self._after(every, step + 1))
            positions = (self.positions + step).clamp(max=self.longest - 1)
            hidden = draft(embedded[None], hidden, positions[None], attention)
            found.append(self._rank(hidden[0, self.rows], step, width))
            attention = attention.after()
        return torch.stack(found, dim=-1)

    def _features(self) -> Tensor:
        """The target's features [1, N, feature_size]."""
        attention = PackedAttention(self.edges, self.longest)
        rows = self.tokens[None], self.positions[None]
        return self.models.draft_features(self.models.target(*rows, attention, self.models.taps))

    def _after(self, rows: Tensor, count: int) -> Tensor:
        """The tokens ``count`` places after rows; past the last one, the last."""
        return self.tokens[(rows + count).clamp(max=len(self.tokens) - 1)]

    def _rank(self, hidden: Tensor, step: int, width: int) -> Tensor:
        """Place [R] of the true token among what is proposed from hidden states [R, d]."""
        vocab, head = self.models.target.config.vocab_size, self.drafter.head
        true = self._after(self.rows, step + 2)
        known = self.rows + step + 2 < self.ends
        limit = max(1, _LOGITS.get(hidden.device.type, _CPU_LOGITS) // vocab)
        found = []
        for part in torch.split(torch.arange(len(hidden), device=hidden.device), limit):
            logits = self.drafter.logits(hidden[part])[:, None]
            sampling = self.sampling.select(part)
            drawn_at = self.positions[self.rows[part]] + step + 2
            noise = position_noise(sampling, drawn_at[:, None], vocab)
            count = min(width, logits.shape[-1])
            best = draw_top(logits, sampling, noise, None, head.token_ids, count)[:, 0]
            hits = (head.to_target(best) == true[part, None]) & known[part, None]
            found.append(torch.where(hits.any(dim=-1), hits.int().argmax(dim=-1), width))
        return torch.cat(found)
