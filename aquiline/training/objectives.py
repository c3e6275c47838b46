"""What the draft is trained on: one sum over scored positions and unrolled steps.

    loss = sum_s decay^s / sum_s decay^s * (w_r regression_s + w_d divergence_s)

The regression compares the predicted feature with the target's (PAPER: loss), the divergence the
two laws that heads make of them (vocabulary_loss.py). ``objective`` names the pair:

    eagle   regression + 0.1 cross-entropy, the paper's
    kl      forward Kullback-Leibler divergence
    tv      total variation, which is one minus the acceptance
    lk      the LK hybrid: kl while acceptance is low, tv as it grows

A mean is taken over the positions of the whole optimiser step, so the losses and gradients of its
micro-batches and ranks add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.kernels import ops
from aquiline.kernels.ops import Divergence
from aquiline.training.config import TrainConfig
from aquiline.training.vocabulary_loss import STATISTICS, Heads, vocabulary_loss

DIVERGENCES: dict[str, Divergence] = {"eagle": "ce", "kl": "kl", "tv": "tv", "lk": "lk"}


@dataclass(frozen=True)
class Loss:
    """A micro-batch's share of the loss; shares add up over micro-batches and ranks.

    Attributes:
        total: differentiable scalar.
        terms: detached, [S] by unrolled step: cross_entropy, acceptance, top1, and regression where
            it is trained. Means over the positions scored in step 0; the few that a document's
            first tokens take from later steps count as zero there.
    """

    total: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """P scored positions of S unrolled steps.

    Attributes:
        hidden: [S, P, d] the draft's hidden states, in EAGLE-1 its predicted features.
        read: [S, P, d] what its head reads of them.
        features: [P, d] the target's features that they stand for.
        taken: bool [S, P], whether the position takes part in the step.
    """

    hidden: Tensor
    read: Tensor
    features: Tensor
    taken: Tensor


def objective_loss(config: TrainConfig, rows: Rows, heads: Heads, count: Tensor) -> Loss:
    """The objective on some rows. ``count``: scored positions of the whole optimiser step."""
    steps = rows.taken.shape[0]
    decay = config.step_decay ** torch.arange(steps, device=count.device).float()
    weights = rows.taken * (decay / (decay.sum() * count))[:, None]
    total, sums = vocabulary_loss(
        DIVERGENCES[config.objective], config.lk_eta, rows.read, rows.features, heads, weights
    )
    terms = dict(zip(STATISTICS, sums / count, strict=True))
    total = config.weight_of_distribution * total
    if config.weight_of_regression:
        beta = 0.0 if config.regression == "l1" else 1.0
        error = ops.regression(rows.hidden, rows.features, beta)
        total = total + config.weight_of_regression * (weights * error).sum()
        terms["regression"] = (rows.taken * error).sum(dim=-1).detach() / count
    return Loss(total, terms)
