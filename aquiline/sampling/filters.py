"""From logits to the distribution that is sampled: temperature, top-k, top-p, min-p.

In this order: divide by the temperature, keep the top_k likeliest, of those the smallest set whose
mass reaches top_p (a token stays if the mass strictly above it is less than top_p), of those the
tokens with at least min_p times the largest probability. Ties with the last token kept are kept.
Dropped tokens get score -inf. Greedy rows (temperature 0) take their best token whatever the
filters say. Both verification rules use these functions, so both sample the same distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquiline.sampling.batch import SamplingBatch

NEGATIVE_INFINITY = float("-inf")
MIN_TEMPERATURE = 1e-6  # a smaller one would overflow; here all but exact ties are greedy already


def scaled_scores(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """logits [B, N, V] / temperature, fp32 at least; greedy rows undivided."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.all_greedy:
        return logits
    temperature = sampling.temperature.to(logits.dtype)[:, None, None]
    divisor = temperature.clamp_min(MIN_TEMPERATURE)
    return logits / torch.where(temperature == 0, 1.0, divisor)


def cut_top_k(scores: Tensor, sampling: SamplingBatch) -> Tensor:
    """Scores [B, N, V] with everything below the top_k-th at -inf; greedy rows are untouched."""
    vocab = scores.shape[-1]
    wanted = torch.where(sampling.top_k > 0, sampling.top_k, vocab).clamp(max=vocab)
    cut = (sampling.top_k > 0) & (sampling.temperature > 0)
    largest = scores.topk(int(torch.where(cut, wanted, 1).max()), dim=-1).values
    index = torch.where(cut, wanted, 1)[:, None, None].expand(*scores.shape[:2], 1) - 1
    below = scores < largest.gather(-1, index)
    return scores.masked_fill(below & cut[:, None, None], NEGATIVE_INFINITY)


def min_p_floor(scores: Tensor, sampling: SamplingBatch) -> Tensor:
    """[B, N, 1]: the lowest score that min_p keeps."""
    best = scores.amax(dim=-1, keepdim=True)
    return best + sampling.min_p.to(scores.dtype).log()[:, None, None]


def cut_top_p(scores: Tensor, sampling: SamplingBatch) -> Tensor:
    """Scores [B, N, V] with everything outside the nucleus at -inf."""
    ranked = scores.sort(dim=-1, descending=True).values
    probs = ranked.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # mass of the tokens ranked before
    top_p = sampling.top_p.to(scores.dtype)[:, None, None]
    count = ((before < top_p) | (top_p >= 1)).sum(dim=-1, keepdim=True).clamp(min=1)
    return scores.masked_fill(scores < ranked.gather(-1, count - 1), NEGATIVE_INFINITY)


def filtered_scores(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """logits [B, N, V] -> scores whose softmax is the distribution to sample, [B, N, V].

    Greedy rows come back undivided and uncut.
    """
    scores = scaled_scores(logits, sampling)
    if not sampling.filtered:
        return scores
    kept = cut_top_k(scores, sampling) if sampling.any_top_k else scores
    floor = min_p_floor(kept, sampling)
    kept = cut_top_p(kept, sampling) if sampling.any_top_p else kept
    kept = kept.masked_fill(kept < floor, NEGATIVE_INFINITY)
    return torch.where((sampling.temperature == 0)[:, None, None], scores, kept)


def probabilities(logits: Tensor, sampling: SamplingBatch) -> Tensor:
    """logits [B, N, V] -> the exact target distribution [B, N, V]; one-hot for greedy rows."""
    scores = filtered_scores(logits, sampling)
    one_hot = torch.zeros_like(scores).scatter_(-1, scores.argmax(dim=-1, keepdim=True), 1.0)
    greedy = (sampling.temperature == 0)[:, None, None]
    return torch.where(greedy, one_hot, scores.softmax(dim=-1))
