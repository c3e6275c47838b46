"""The EAGLE objective: regression of the target's features + 0.1 x cross-entropy (PAPER: loss).

    loss = w_r * SmoothL1(h_draft, h_target) + w_c * CE(softmax(head(h_target)), head(h_draft))

Both are means over the positions whose predicted token is the assistant's. The cross-entropy and
its gradient are computed chunk by chunk in one pass, so the logits of a batch (positions x
vocabulary) never exist at once; that is possible because the head is frozen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 8192


@dataclass(frozen=True)
class Loss:
    """total is differentiable; regression, cross_entropy and top1 are detached means.

    ``top1`` is the share of positions where draft and target agree on the likeliest token.
    """

    total: Tensor
    regression: Tensor
    cross_entropy: Tensor
    top1: Tensor


def eagle_loss(
    predicted: Tensor,
    features: Tensor,
    head: Tensor,
    regression_weight: float,
    cross_entropy_weight: float,
) -> Loss:
    """predicted, features [P, d]: the draft's and the target's feature at each loss position.

    ``head`` [V, d] is the target's frozen LM head.
    """
    regression = F.smooth_l1_loss(predicted.float(), features.float())
    cross_entropy, agreed = _ChunkedCrossEntropy.apply(predicted, features, head)  # type: ignore[no-untyped-call]
    total = regression_weight * regression + cross_entropy_weight * cross_entropy
    return Loss(total, regression.detach(), cross_entropy.detach(), agreed)


def _chunk_terms(predicted: Tensor, features: Tensor, head: Tensor) -> tuple[Tensor, ...]:
    """Summed cross-entropy, count of agreements, and d(sum)/d(draft logits) of one chunk."""
    draft = (predicted @ head.T).float()
    target = (features @ head.T).float()
    log_draft, target_probs = draft.log_softmax(dim=-1), target.softmax(dim=-1)
    loss = -(target_probs * log_draft).sum()
    agreed = (draft.argmax(dim=-1) == target.argmax(dim=-1)).sum()
    return loss, agreed, (log_draft.exp() - target_probs).to(predicted.dtype)


@functools.cache
def _compiled_terms() -> Callable[..., tuple[Tensor, ...]]:
    """On CUDA the softmaxes fuse into a few passes over the logits."""
    return torch.compile(_chunk_terms, dynamic=True)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean CE of predicted [P, d] against the target's distribution, and the agreement rate."""

    @staticmethod
    def forward(
        ctx: Any, predicted: Tensor, features: Tensor, head: Tensor
    ) -> tuple[Tensor, Tensor]:
        terms = _compiled_terms() if predicted.is_cuda else _chunk_terms
        count = predicted.shape[0]
        loss = torch.zeros((), device=predicted.device)
        agreed = torch.zeros((), device=predicted.device)
        gradient = torch.empty_like(predicted)
        for start in range(0, count, CHUNK):
            part = slice(start, start + CHUNK)
            part_loss, part_agreed, delta = terms(predicted[part], features[part], head)
            loss, agreed = loss + part_loss, agreed + part_agreed
            gradient[part] = delta @ head
        ctx.save_for_backward(gradient)
        ctx.count = count
        return loss / count, agreed / count

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_agreed: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (grad_loss / ctx.count).to(gradient.dtype), None, None
