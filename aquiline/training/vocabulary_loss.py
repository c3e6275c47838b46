"""Losses between two laws over the vocabulary, without ever holding the logits of a batch.

    p = softmax(target_head h)     the target's law, V tokens
    q = softmax(draft_head x)      the draft's, over its own Vd tokens; elsewhere q = 0

    cross-entropy  -sum p' log q           d / d logits    q - p'
    kl             sum p' log(p' / q)                      q - p'
    tv             1 - sum min(p, q)                       q (M - m),  m = [q < p], M = sum q m
    lk             a kl + (1 - a) tv,  a = exp(-eta sum min(p, q)), a held constant

p' is p restricted to the draft's vocabulary and renormalised (p itself if that is the whole one);
the acceptance sum min(p, q) is taken with p as it is. ``lk`` is the hybrid of "LK losses" (arXiv
2602.23881), with one a per position.

Every loss is linear in the gradient that comes from above, so loss and gradient are computed
together, a chunk of positions at a time: two products make the logits, one fused pass over them
yields the sums and the gradient of the logits, one product (two if the head is trained) takes that
back. A chunk's target logits serve all unrolled steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aquiline.kernels import ops
from aquiline.kernels.ops import Divergence

# Logits of one kind that exist at once: 1 GiB in bf16; a CPU's eager pass holds a dozen of each.
LOGITS = {"cuda": 2**29, "cpu": 2**24}
STATISTICS = ("cross_entropy", "acceptance", "top1")


@dataclass(frozen=True)
class Heads:
    """draft [Vd, d], target [V, d]; ``token_ids`` [Vd] are the draft's tokens, None for all V."""

    draft: Tensor
    target: Tensor
    token_ids: Tensor | None


def vocabulary_loss(
    divergence: Divergence,
    eta: float,
    hidden: Tensor,
    features: Tensor,
    heads: Heads,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the divergence, differentiable in ``hidden`` and ``heads.draft``.

    Args:
        hidden: [S, P, d], what the draft's head reads at P positions in each of S steps.
        features: [P, d], what the target's head reads there.
        weights: [S, P], from 0; a position of weight 0 counts nowhere.

    Returns:
        The loss, and plain sums [3, S] of STATISTICS. Draft and target agree on top1 if a token is
        the likeliest of both; tied tokens are all the likeliest.
    """
    return _VocabularyLoss.apply(  # type: ignore[no-untyped-call, no-any-return]
        hidden, heads.draft, features, heads.target, heads.token_ids, weights, divergence, eta
    )


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        draft_head: Tensor,
        features: Tensor,
        target_head: Tensor,
        token_ids: Tensor | None,
        weights: Tensor,
        divergence: Divergence,
        eta: float,
    ) -> tuple[Tensor, Tensor]:
        steps, count, _ = hidden.shape
        wide = _wide(hidden)
        sums = torch.zeros(1 + len(STATISTICS), steps, dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(draft_head, dtype=wide) if ctx.needs_input_grad[1] else None
        most = max(1, LOGITS[hidden.device.type] // (steps * len(target_head)))
        chunks = -(-count // most)
        for chunk in range(chunks):
            part = slice(chunk * count // chunks, (chunk + 1) * count // chunks)
            rows = hidden[:, part].reshape(-1, hidden.shape[-1])
            draft = (rows @ draft_head.T).view(steps, -1, len(draft_head))
            target = features[part] @ target_head.T
            found, slope = ops.divergence(
                draft, target, token_ids, weights[:, part], divergence, eta
            )
            sums += found
            grad_hidden[:, part] = slope @ draft_head
            if grad_head is not None:
                grad_head += slope.flatten(0, 1).T @ rows
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = draft_head.dtype
        statistics = sums[1:].clone()
        ctx.mark_non_differentiable(statistics)
        return sums[0].sum(), statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_head is not None:
            grad_head = (grad_head * grad).to(ctx.head_dtype)
        return (grad_hidden * grad.to(grad_hidden.dtype), grad_head, *[None] * 6)


def _wide(x: Tensor) -> torch.dtype:
    """fp32, or fp64 where the tensor is."""
    return torch.promote_types(x.dtype, torch.float32)
