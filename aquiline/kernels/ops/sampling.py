"""Sampling and verification of a tree.

Twins in ``reference_sampling.py``. B requests, N rows each. The score of a token is
logits / temperature in fp32 (fp64 for fp64 logits); greedy rows (temperature 0) are undivided.
On CUDA every parameter is read on the device, row by row: a graph serves any batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aquiline.kernels import reference_sampling
from aquiline.kernels.noise import NoiseKey
from aquiline.kernels.ops.device import on_triton

if torch.cuda.is_available():
    from aquiline.kernels.triton import multi_round, sampling


class Followed(NamedTuple):
    """The path that matching children make: its depth [B], its nodes and the token drawn after each
    [B, D + 1]; past the depth both repeat the last."""

    depth: Tensor
    path: Tensor
    drawn: Tensor


def follow_matches(
    tokens: Tensor, drawn: Tensor, parents: Tensor, ancestors: Tensor, routes: Tensor
) -> Followed:
    """From the root, step to the child whose token was drawn at its parent, as deep as it goes.

    Args:
        tokens, drawn: [B, N] the token at each node, and the one drawn after it.
        parents: [N]; ancestors: bool [N, N], row i True at i and every ancestor of i.
        routes: [N, D + 1] the node at each depth on the way to node i; past its depth, i itself.
    """
    if tokens.is_cuda:
        return Followed(*sampling.follow_matches(tokens, drawn, parents, ancestors, routes))
    return Followed(*reference_sampling.follow_matches(tokens, drawn, parents, ancestors, routes))


def score_floor(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The lowest score that the filters of a row keep: logits [B, N, V] -> [B, N].

    First top_k (0: all), then top_p of what is left, renormalised (a token is kept if the mass
    strictly above it is less), then min_p (relative to the best). Equals of the last one kept are
    kept. Any number between that score and the next one below may be returned; -inf for greedy
    rows and rows without filters.

    Args:
        temperature, top_p, min_p: [B] fp32.
        top_k: [B] int64.
    """
    if on_triton(logits):
        return sampling.score_floor(logits, temperature, top_k, top_p, min_p)
    return reference_sampling.score_floor(logits, temperature, top_k, top_p, min_p)


def draw_top(
    logits: Tensor,
    floor: Tensor | None,
    temperature: Tensor,
    key: NoiseKey | None,
    levels: Tensor | None,
    token_ids: Tensor | None,
    count: int,
) -> Tensor:
    """Indices [B, N, count] of the best perturbed scores among those >= floor, best first.

    Perturbed is score + Gumbel noise; greedy rows get none. Equals go to the lowest index. Where
    fewer than ``count`` are kept, the others are any indices not yet named.

    Args:
        logits: [B, N, V]; ``count`` <= V.
        floor: [B, N] of ``score_floor``, or None.
        key: None makes every row greedy; then ``floor`` cannot matter.
        levels: [N] column of the key's positions for each row; None: column n for row n.
        token_ids: [V] the token that each index stands for, which names its noise; None: itself.
    """
    if on_triton(logits):
        return sampling.draw_top(logits, floor, temperature, key, levels, token_ids, count)
    return reference_sampling.draw_top(logits, floor, temperature, key, levels, token_ids, count)


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
    """Walk down a tree of N nodes, sibling by sibling: (leaf [B], token drawn after it [B]).

    See speculation.verification.multi_round. Probabilities are those of the scores >= floor.

    Args:
        target_logits: [B, N, V] after each node; ``target_floor`` [B, N] or None.
        draft_logits: [B, E, Vd] that the nodes with children drew them from; ``draft_floor``
            [B, E] or None.
        tokens: [B, N] the token at each node; siblings differ.
        children: [N, K] int64 nodes, by rank, then -1; a node comes after its parent.
        draft_rows: [N] int64 row of the draft logits of each node with children.
        draft_columns: [V] int64 draft index of each target token, -1 if it has none; None: itself.
        accept_key, residual_key: noise at positions [B, D + 1]; uniforms and Gumbel noise.
    """
    accept = reference_sampling.multi_round_accept
    if on_triton(target_logits):
        accept = multi_round.multi_round_accept
    return accept(
        target_logits, target_floor, draft_logits, draft_floor, tokens, temperature, children,
        draft_rows, draft_columns, accept_key, residual_key,
    )  # fmt: skip
