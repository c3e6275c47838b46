"""Training: losses over the vocabulary and of features, and the chain of unrolled attention.

Twins in ``reference_training.py``. C positions of S unrolled steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from aquiline.kernels import reference_training
from aquiline.kernels.ops.device import on_triton

if torch.cuda.is_available():
    from aquiline.kernels.triton import chain
    from aquiline.kernels.triton import divergence as laws
    from aquiline.kernels.triton import regression as errors

Divergence = Literal["ce", "kl", "tv", "lk"]


def divergence(
    draft: Tensor,
    target: Tensor,
    token_ids: Tensor | None,
    weights: Tensor,
    kind: Divergence,
    eta: float,
) -> tuple[Tensor, Tensor]:
    """A divergence between two laws over the vocabulary and its gradient; formulas in
    training/vocabulary_loss.py.

    Args:
        draft: logits [S, C, Vd], contiguous. They are spent: the gradient may lie in their place.
        target: logits [C, V], the same for all S steps.
        token_ids: int64 [Vd] the target's token of each of the draft's; None: Vd = V, in order.
        weights: [S, C], from 0. Rows of weight 0 count nowhere.
        eta: how fast ``lk`` turns from kl to tv.

    Returns:
        Sums over C [4, S], fp32 at least: of weight times divergence, and plain of cross-entropy,
        of acceptance, and of rows where a token is the likeliest of both laws (tied tokens all
        are). Then [S, C, Vd], the gradient of the weighted divergence by the draft's logits.
    """
    compute = laws.divergence if on_triton(draft) else reference_training.divergence
    return compute(draft, target, token_ids, weights, kind, eta)


def regression(hidden: Tensor, features: Tensor, beta: float) -> Tensor:
    """Mean error [S, P], fp32 at least, of hidden [S, P, d] against features [P, d].

    An element's error e counts |e| - beta / 2, or e^2 / (2 beta) where |e| < beta: beta 1 is smooth
    L1, beta 0 is L1; no other is served. Differentiable in ``hidden`` alone.
    """
    compute = errors.regression if on_triton(hidden) else reference_training.regression
    return compute(hidden, features, beta)


def merge_chain(
    q: Tensor,
    prefix: Tensor,
    prefix_lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Attention of N rows over a prefix, done already, and over a few keys of each row's own.

    Args:
        q: [N, H, D]; prefix: [N, H, D] and its log-sum-exp [H, N], fp32 at least.
        keys, values: one or more [N, K, D]; row n sees row n of each.

    Returns:
        Output [N, H, D] and log-sum-exp [H, N] over both.
    """
    merge = chain.merge_chain if on_triton(q) else reference_training.merge_chain
    return merge(q, prefix, prefix_lse, keys, values)


def merge_chain_backward(
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    dq: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Gradients of q, of each of ``keys`` and of each of ``values``, for ``grad`` [N, H, D].

    ``out`` and ``lse`` are ``merge_chain``'s. ``dq`` [N, H, D] is the prefix's share of the first,
    and is spent: the whole may lie in its place.
    """
    share = reference_training.merge_chain_backward
    if on_triton(q):
        share = chain.merge_chain_backward
    return share(grad, q, out, lse, keys, values, dq)
