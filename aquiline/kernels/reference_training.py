"""Plain-torch twins of the training operations: the definition that the kernels are tested against.

Exact in float64; in lower precision computed in fp32. See ops.py for the contracts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(
    draft: Tensor,
    target: Tensor,
    token_ids: Tensor | None,
    weights: Tensor,
    kind: str,
    eta: float,
) -> tuple[Tensor, Tensor]:
    log_law = _wide(target).log_softmax(dim=-1)
    target_probs, likeliest = log_law.exp(), _likeliest(target)
    if token_ids is not None:
        target_probs, likeliest = target_probs[:, token_ids], likeliest[:, token_ids]
        log_law = _wide(target[:, token_ids]).log_softmax(dim=-1)
    log_draft = _wide(draft).log_softmax(dim=-1)
    law, draft_probs = log_law.exp(), log_draft.exp()

    cross_entropy = -(law * log_draft).sum(dim=-1)
    acceptance = torch.minimum(target_probs, draft_probs).sum(dim=-1)
    agreed = (likeliest & _likeliest(draft)).any(dim=-1)

    loss, slope = cross_entropy, draft_probs - law
    if kind in ("kl", "lk"):
        loss = cross_entropy + (law * log_law).sum(dim=-1)
    if kind in ("tv", "lk"):
        short = (draft_probs < target_probs).to(law.dtype)
        mean = (draft_probs * short).sum(dim=-1, keepdim=True)
        away = draft_probs * (mean - short)
        blend = torch.zeros_like(loss) if kind == "tv" else torch.exp(-eta * acceptance)
        loss = blend * loss + (1 - blend) * (1 - acceptance)
        slope = blend[..., None] * slope + (1 - blend[..., None]) * away

    counted = (weights > 0).to(law.dtype)
    terms = (weights * loss, counted * cross_entropy, counted * acceptance, counted * agreed)
    sums = torch.stack([term.sum(dim=-1) for term in terms])
    return sums, (slope * weights[..., None]).to(draft.dtype)


def _likeliest(logits: Tensor) -> Tensor:
    return logits == logits.amax(dim=-1, keepdim=True)


def _wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
