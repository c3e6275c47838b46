"""Plain-torch twins of the training operations: the definition that the kernels are tested against.

Exact in float64; in lower precision computed in fp32. See ops for the contracts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# ----------------------------------------------------------------------------------------- the loss


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


def regression(hidden: Tensor, features: Tensor, beta: float) -> Tensor:
    aims = _wide(features).expand_as(hidden)
    return F.smooth_l1_loss(_wide(hidden), aims, reduction="none", beta=beta).mean(dim=-1)


# ---------------------------------------------------------------------------------------- the chain


def merge_chain(
    q: Tensor,
    prefix: Tensor,
    prefix_lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    grouped, lse0 = _grouped(q, keys[0]), _by_row(prefix_lse, keys[0])
    scores = [_dots(grouped, key) for key in keys]
    lse = torch.stack([lse0, *scores]).logsumexp(dim=0)
    out = _grouped(prefix, keys[0]) * (lse0 - lse).exp()[..., None]
    for score, value in zip(scores, values, strict=True):
        out = out + (score - lse).exp()[..., None] * value[:, :, None]
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1).T.contiguous()


def merge_chain_backward(
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    dq: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    grouped, up, log_sum = (_grouped(q, keys[0]), _grouped(grad, keys[0]), _by_row(lse, keys[0]))
    delta = (up * _grouped(out, keys[0])).sum(dim=-1)
    total, dkeys, dvalues = _grouped(dq, keys[0]), [], []
    for key, value in zip(keys, values, strict=True):
        probs = (_dots(grouped, key) - log_sum).exp()
        slope = probs * ((up * value[:, :, None]).sum(dim=-1) - delta) * q.shape[-1] ** -0.5
        total = total + slope[..., None] * key[:, :, None]
        dkeys.append((slope[..., None] * grouped).sum(dim=2).to(q.dtype))
        dvalues.append((probs[..., None] * up).sum(dim=2).to(q.dtype))
    return total.flatten(1, 2).to(q.dtype), tuple(dkeys), tuple(dvalues)


def _grouped(x: Tensor, key: Tensor) -> Tensor:
    """[N, H, D] -> [N, K, G, D], in fp32 at least."""
    return _wide(x).view(len(x), key.shape[1], -1, x.shape[-1])


def _by_row(lse: Tensor, key: Tensor) -> Tensor:
    """[H, N] -> [N, K, G]."""
    return lse.T.view(lse.shape[1], key.shape[1], -1)


def _dots(grouped: Tensor, key: Tensor) -> Tensor:
    """Scaled scores [N, K, G] of each row's queries and its key."""
    dots = (grouped * key[:, :, None]).sum(dim=-1)
    return dots * float(key.shape[-1] ** -0.5)


# ------------------------------------------------------------------------------------ low precision


def _wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
