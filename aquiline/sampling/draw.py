"""Draw one token from a distribution with noise given from outside (Gumbel-max).

argmax over tokens of score + noise is a draw from softmax(score) when the noise is Gumbel. The
noise is a pure function of (seed, choice, position, token id), so the draw at a position does not
depend on the batch, the tree or whether speculation is on.

Top-p needs no sort: the winner is inside the nucleus if the mass strictly above it is less than
top_p. If it is not, neither is any token below it, so those are cut and the same noise draws again;
the winner of a larger set that lies in a smaller one is the smaller one's winner too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquiline.kernels import ops
from aquiline.sampling.batch import SamplingBatch
from aquiline.sampling.filters import NEGATIVE_INFINITY, cut_top_k, min_p_floor, scaled_scores


def position_noise(sampling: SamplingBatch, positions: Tensor, vocab: int) -> Tensor | None:
    """The noise of the coupled draw at positions [B, P]: [B, P, V], or None if all are greedy.

    Greedy rows get zero noise, so that their perturbed scores are their logits.
    """
    if sampling.all_greedy:
        return None
    noise = ops.gumbel_noise(sampling.seeds, sampling.choices, positions, vocab)
    return noise.masked_fill_((sampling.temperature == 0)[:, None, None], 0.0)


def draw(logits: Tensor, sampling: SamplingBatch, noise: Tensor | None) -> Tensor:
    """One token per row: logits, noise [B, N, V] -> ids [B, N]; ties go to the lowest id."""
    scores = scaled_scores(logits, sampling)
    if noise is None:
        return scores.argmax(dim=-1)
    if sampling.any_top_k:
        scores = cut_top_k(scores, sampling)
    perturbed = scores + noise
    if sampling.any_min_p:
        perturbed.masked_fill_(scores < min_p_floor(scores, sampling), NEGATIVE_INFINITY)
    winner = perturbed.argmax(dim=-1, keepdim=True)
    if sampling.any_top_p:
        probs = scores.softmax(dim=-1)
        top_p = sampling.top_p.to(scores.dtype)[:, None, None]
        settled = (top_p >= 1) | (sampling.temperature == 0)[:, None, None]
        while True:
            score = scores.gather(-1, winner)
            above = torch.where(scores > score, probs, 0.0).sum(dim=-1, keepdim=True)
            outside = ~settled & (above >= top_p)
            if not outside.any():
                break
            perturbed.masked_fill_(outside & (scores <= score), NEGATIVE_INFINITY)
            winner = perturbed.argmax(dim=-1, keepdim=True)
    return winner.squeeze(-1)
