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

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aquiline.attention.backend import Angles, Projection
from aquiline.attention.packed import PackedAttention
from aquiline.core.errors import AquilineError
from aquiline.core.params import SamplingParams
from aquiline.decoding.models import DecoderModels, Drafter
from aquiline.evaluation.texts import FixedText
from aquiline.kernels import ops
from aquiline.sampling.batch import SamplingBatch
from aquiline.sampling.draw import draw_top, position_noise

WIDTH = 8  # children that are ranked
_BATCH_TOKENS = {"cuda": 16384}  # of a padded batch
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
        for index, one in zip(members, found.ranks(depth, width).cpu(), strict=True):
            ranks[index] = one[: texts[index].roots]
    return ranks


def _batches(texts: Sequence[FixedText], limit: int) -> Iterator[list[int]]:
    """Indices of texts of like length that fill ``limit`` tokens, padded; texts without a root are
    left out."""
    sizes = {i: len(t.prompt) + len(t.tokens) for i, t in enumerate(texts) if t.roots}
    batch: list[int] = []
    for index in sorted(sizes, key=sizes.__getitem__):
        if batch and (len(batch) + 1) * sizes[index] > limit:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class _Batch:
    """B texts side by side, padded to T tokens; R rows each, one for every root (padded too).

    Row i of a text is the pair that comes before its root i, so it lies at column prompt - 1 + i.
    """

    def __init__(
        self, models: DecoderModels, drafter: Drafter, texts: Sequence[FixedText],
        temperature: float,
    ) -> None:  # fmt: skip
        self.models, self.drafter = models, drafter
        device, all_tokens = models.device, [(*text.prompt, *text.tokens) for text in texts]
        longest = max(map(len, all_tokens))
        self.tokens = torch.tensor(
            [[*one, *[0] * (longest - len(one))] for one in all_tokens], device=device
        )
        self.counts = torch.tensor([len(one) for one in all_tokens], device=device)
        first = torch.tensor([len(text.prompt) - 1 for text in texts], device=device)
        roots = torch.arange(max(text.roots for text in texts), device=device)
        self.rows = (first[:, None] + roots).clamp(max=longest - 1)  # [B, R]
        params = SamplingParams(temperature=temperature)
        self.sampling = SamplingBatch.of(
            [params] * len(texts), [text.seed for text in texts], device
        )

    def ranks(self, depth: int, width: int) -> Tensor:
        """[B, R, depth]."""
        tokens, rows = self.tokens, self.rows
        draft = self.drafter.draft
        columns = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        attention = _ForcedAttention(columns[:, None] <= rows[..., None])
        inputs = draft.fuse(self._features(columns))
        every: Tensor = draft(self._embed(columns + 1), inputs, columns, attention)
        hidden = every.gather(1, rows[..., None].expand(-1, -1, every.shape[-1]))
        found = [self._rank(hidden, 1, width)]
        for level in range(2, depth + 1):
            positions = (rows + level - 1).clamp(max=tokens.shape[1] - 1)
            hidden = draft(self._embed(rows + level), hidden, positions, attention)
            found.append(self._rank(hidden, level, width))
        return torch.stack(found, dim=-1)

    def _features(self, columns: Tensor) -> Tensor:
        """The target's features [B, T, feature_size], every text a document of a packed row."""
        count, width = self.tokens.shape
        edges = torch.arange(count + 1, dtype=torch.int32, device=self.tokens.device) * width
        attention = PackedAttention(edges, width)
        flat = self.tokens.view(1, -1), columns.reshape(1, -1)
        output = self.models.target(*flat, attention, self.models.taps)
        return self.models.draft_features(output).view(count, width, -1)

    def _at(self, columns: Tensor) -> Tensor:
        """Tokens at columns [B, n]; past the last column, the last."""
        return self.tokens.gather(1, columns.clamp(max=self.tokens.shape[1] - 1))

    def _embed(self, columns: Tensor) -> Tensor:
        return self.drafter.embed(self._at(columns))

    def _rank(self, hidden: Tensor, level: int, width: int) -> Tensor:
        """Place [B, R] of the true token among the children at depth ``level``."""
        vocab, head = self.models.target.config.vocab_size, self.drafter.head
        limit = _LOGITS.get(hidden.device.type, _CPU_LOGITS)
        found = []
        for start in range(0, hidden.shape[1], step := max(1, limit // (len(hidden) * vocab))):
            part = slice(start, start + step)
            logits, positions = self.drafter.logits(hidden[:, part]), self.rows[:, part] + level + 1
            noise = position_noise(self.sampling, positions, vocab)
            count = min(width, logits.shape[-1])
            best = draw_top(logits, self.sampling, noise, None, head.token_ids, count)
            hits = head.to_target(best) == self._at(positions)[..., None]
            hits &= (positions < self.counts[:, None])[..., None]
            found.append(torch.where(hits.any(dim=-1), hits.int().argmax(dim=-1), width))
        return torch.cat(found, dim=1)


class _ForcedAttention:
    """Attention of a draft that is unrolled from many roots at once.

    The first pass is causal over all T columns and its keys are kept. Every later pass has one row
    for each root: it sees the first pass's keys up to the root's pair (``visible`` [B, R, T]) and
    one key of its own for each depth since, itself included.
    """

    def __init__(self, visible: Tensor) -> None:
        self._visible = visible
        self._prefix: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def run(
        self, layer: int, x: Tensor | ops.Normed, project: Projection, kv_heads: int, angles: Angles
    ) -> Tensor:
        """See Attention."""
        heads = project(x)
        heads = heads.view(*heads.shape[:-1], -1, angles.cos.shape[-1])
        turned = ops.rotary(heads[:, :, :-kv_heads], angles.cos, angles.signed_sin)
        q, k, v = turned[:, :, :-kv_heads], turned[:, :, -kv_heads:], heads[:, :, -kv_heads:]
        if layer not in self._prefix:
            self._prefix[layer], self._own[layer] = (k, v), []
            qt, kt, vt = (part.transpose(1, 2) for part in (q, k, v))
            causal = F.scaled_dot_product_attention(qt, kt, vt, is_causal=True, enable_gqa=True)
            return causal.transpose(1, 2)
        self._own[layer].append((k, v))
        own_k, own_v = (torch.stack(parts, dim=2) for parts in zip(*self._own[layer], strict=True))
        return _attend(q, *self._prefix[layer], self._visible, own_k, own_v)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, own_k: Tensor, own_v: Tensor
) -> Tensor:
    """q [B, R, H, D] over k, v [B, T, K, D] where ``visible`` and own_k, own_v [B, R, S, K, D];
    in fp32 at least."""
    exact = torch.promote_types(q.dtype, torch.float32)
    grouped = q.view(*q.shape[:2], k.shape[2], -1, q.shape[-1]).to(exact) * q.shape[-1] ** -0.5
    k, v, own_k, own_v = (part.to(exact) for part in (k, v, own_k, own_v))
    prefix = torch.einsum("brkgd,btkd->bkgrt", grouped, k)
    prefix = prefix.masked_fill(~visible[:, None, None], float("-inf"))
    own = torch.einsum("brkgd,brskd->bkgrs", grouped, own_k)
    seen = prefix.shape[-1]
    weights = torch.cat((prefix, own), dim=-1).softmax(dim=-1)
    out = torch.einsum("bkgrt,btkd->brkgd", weights[..., :seen], v)
    out += torch.einsum("bkgrs,brskd->brkgd", weights[..., seen:], own_v)
    return out.flatten(2, 3).to(q.dtype)
