"""Plain-torch twins of the sampling operations: the definition that the kernels are tested against.

A row's *score* is logits / temperature; greedy rows (temperature 0) are undivided. Every filter
keeps an upper set of scores, so a distribution is its scores and one number, the floor: the lowest
score kept. A draw is the best of score + Gumbel noise among those. See ops for the contracts.
These functions look at the parameters on the host to skip work nobody asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquiline.kernels.noise import NoiseKey

NEGATIVE_INFINITY = float("-inf")
MIN_TEMPERATURE = 1e-6  # a smaller one would overflow; here all but exact ties are greedy already
_HEADS = (256, 4096)  # the nucleus usually lies in the first few tokens, and a sort is slow


def scaled_scores(logits: Tensor, temperature: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    divisor = torch.where(temperature == 0, 1.0, temperature.clamp_min(MIN_TEMPERATURE))
    return logits / divisor.to(logits.dtype)[:, None, None]


# ------------------------------------------------------------------------------------- the floor


def score_floor(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    scores = scaled_scores(logits, temperature)
    sampled = temperature > 0
    floor = scores.new_full(scores.shape[:2], NEGATIVE_INFINITY)
    if bool((sampled & (top_k > 0)).any()):
        floor = _top_k_floor(scores, torch.where(sampled, top_k, 0))
    if bool((sampled & (top_p < 1)).any()):
        kept = scores.masked_fill(scores < floor[..., None], NEGATIVE_INFINITY)
        floor = torch.maximum(floor, _top_p_floor(kept, torch.where(sampled, top_p, 1.0)))
    if bool((sampled & (min_p > 0)).any()):
        lowest = scores.amax(dim=-1) + min_p.to(scores.dtype).log()[:, None]
        floor = torch.maximum(floor, lowest)
    return torch.where(sampled[:, None], floor, NEGATIVE_INFINITY)


def _top_k_floor(scores: Tensor, top_k: Tensor) -> Tensor:
    """The top_k-th best score; -inf where top_k is 0."""
    wanted = top_k.clamp(min=1, max=scores.shape[-1])
    largest = scores.topk(int(wanted.max()), dim=-1).values
    index = (wanted - 1)[:, None, None].expand(*scores.shape[:2], 1)
    lowest = largest.gather(-1, index).squeeze(-1)
    return torch.where((top_k > 0)[:, None], lowest, NEGATIVE_INFINITY)


def _top_p_floor(scores: Tensor, top_p: Tensor) -> Tensor:
    """The lowest score that has less than top_p of the mass above it; -inf where top_p is 1."""
    total = scores.logsumexp(dim=-1, keepdim=True)
    limit = torch.where(top_p < 1, top_p, NEGATIVE_INFINITY).to(scores.dtype)[:, None]
    vocab = scores.shape[-1]
    for head in (*(size for size in _HEADS if size < vocab), vocab):
        ranked = scores.topk(head, dim=-1).values
        probs = (ranked - total).exp()
        before = probs.cumsum(dim=-1) - probs  # mass of the tokens ranked before
        if bool((before[..., -1] >= limit).all()):
            break
    count = (before < limit[..., None]).sum(dim=-1, keepdim=True).clamp(min=1)
    lowest = ranked.gather(-1, count - 1).squeeze(-1)
    return torch.where((top_p < 1)[:, None], lowest, NEGATIVE_INFINITY)


def probabilities(logits: Tensor, floor: Tensor | None, temperature: Tensor) -> Tensor:
    """logits [B, N, V] -> the distribution to sample [B, N, V]; one-hot for greedy rows."""
    scores = scaled_scores(logits, temperature)
    one_hot = torch.zeros_like(scores).scatter_(-1, scores.argmax(dim=-1, keepdim=True), 1.0)
    greedy = (temperature == 0)[:, None, None]
    return torch.where(greedy, one_hot, _softmax(scores, floor))


def _softmax(scores: Tensor, floor: Tensor | None) -> Tensor:
    if floor is not None:
        scores = scores.masked_fill(scores < floor[..., None], NEGATIVE_INFINITY)
    return scores.softmax(dim=-1)


# -------------------------------------------------------------------------------------- the draw


def draw_top(
    logits: Tensor,
    floor: Tensor | None,
    temperature: Tensor,
    key: NoiseKey | None,
    levels: Tensor | None,
    token_ids: Tensor | None,
    count: int,
) -> Tensor:
    if key is None:
        return _best(logits, count)
    perturbed = scaled_scores(logits, temperature)
    below = None if floor is None else perturbed < floor[..., None]
    perturbed += _noise(key, temperature, levels, token_ids, perturbed.shape)
    if below is not None:
        perturbed.masked_fill_(below, NEGATIVE_INFINITY)
    return _best(perturbed, count)


def _noise(
    key: NoiseKey,
    temperature: Tensor,
    levels: Tensor | None,
    token_ids: Tensor | None,
    shape: torch.Size,
) -> Tensor:
    """The noise of logits of ``shape``; zero in greedy rows."""
    if levels is None:
        noise = key.table[:, : shape[1]]
        noise = noise[..., : shape[2]] if token_ids is None else noise[..., token_ids]
    elif token_ids is None:
        noise = key.table[:, levels, : shape[2]]
    else:
        noise = key.table[:, levels[:, None], token_ids]
    greedy = temperature == 0
    return noise.masked_fill(greedy[:, None, None], 0.0) if bool(greedy.any()) else noise


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest, best first; equals in order of index, but those at -inf."""
    if count == 1:
        return scores.argmax(dim=-1, keepdim=True)
    values, indices = scores.topk(min(count + 1, scores.shape[-1]), dim=-1)
    tied = (values[..., 1:] == values[..., :-1]) & (values[..., 1:] > NEGATIVE_INFINITY)
    if not bool(tied.any()):
        return indices[..., :count]
    left = scores.clamp_min(torch.finfo(scores.dtype).min)  # above those taken: no index twice
    taken = []
    for _ in range(count):
        taken.append(left.argmax(dim=-1, keepdim=True))
        left = left.scatter(-1, taken[-1], NEGATIVE_INFINITY)
    return torch.cat(taken, dim=-1)


# ----------------------------------------------------------------------------------- multi-round


def multi_round_accept(
    target_logits: Tensor,
    target_floor: Tensor | None,
    draft_logits: Tensor,
    draft_floor: Tensor | None,
    tokens: Tensor,
    temperature: Tensor,
    children: Tensor,
    draft_rows: Tensor,
    draft_columns: Tensor | None,
    accept_key: NoiseKey,
    residual_key: NoiseKey,
) -> tuple[Tensor, Tensor]:
    target_probs = probabilities(target_logits, target_floor, temperature)
    draft_probs = _softmax(scaled_scores(draft_logits, temperature), draft_floor)
    if draft_columns is not None:
        known = draft_columns >= 0
        draft_probs = draft_probs[..., draft_columns.clamp_min(0)] * known
    uniforms = accept_key.uniforms(children.shape[1])
    batch = torch.arange(len(tokens), device=tokens.device)
    depths = [0] * tokens.shape[1]
    leaf = torch.zeros_like(batch)
    residual_at_leaf = target_probs[:, 0].clone()
    for node, (row, siblings) in enumerate(
        zip(draft_rows.tolist(), children.tolist(), strict=True)
    ):  # level by level: a node comes after its parent
        siblings = [child for child in siblings if child >= 0]
        if not siblings:
            continue
        open_ = leaf == node  # requests still trying this node's children
        residual, proposal = target_probs[:, node], draft_probs[:, row]
        for rank, child in enumerate(siblings):
            depths[child] = depths[node] + 1
            token = tokens[:, child]
            drawn_with = proposal[batch, token]  # 0: the draft had run out of tokens
            accepted = uniforms[:, depths[node], rank] * drawn_with < residual[batch, token]
            taken = open_ & accepted & (drawn_with > 0)
            leaf = torch.where(taken, child, leaf)
            residual_at_leaf = torch.where(taken[:, None], target_probs[:, child], residual_at_leaf)
            open_ = open_ & ~taken
            residual, proposal = after_rejection(residual, proposal, token)
        residual_at_leaf = torch.where(open_[:, None], residual, residual_at_leaf)
    last = residual_key.table[batch, torch.tensor(depths, device=leaf.device)[leaf]]
    return leaf, (residual_at_leaf.log() + last).argmax(dim=-1)


def after_rejection(residual: Tensor, proposal: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """The target's residual and the remaining draft distribution, [B, V] each.

    If rounding leaves no residual mass the target lies under the draft everywhere: it keeps its
    distribution, an event of probability zero in exact arithmetic.
    """
    left = (residual - proposal).clamp_min(0)
    mass = left.sum(dim=-1, keepdim=True)
    left = torch.where(mass > 0, left / mass, residual)
    remaining = proposal.scatter(-1, token[:, None], 0.0)
    total = remaining.sum(dim=-1, keepdim=True)
    return left, torch.where(total > 0, remaining / total, remaining)


def follow_matches(
    tokens: Tensor, drawn: Tensor, parents: Tensor, ancestors: Tensor, routes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    matches = tokens == drawn.gather(1, parents.expand(tokens.shape))
    matches[:, 0] = True
    reached = (matches[:, None, :] | ~ancestors).all(dim=-1)
    depths = ancestors.sum(dim=-1) - 1
    leaf = torch.where(reached, depths, -1).argmax(dim=-1)
    path = routes[leaf]
    return depths[leaf], path, drawn.gather(1, path)
