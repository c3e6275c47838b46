"""The public operations of the engine: signatures, contracts, dispatch by device.

Every operation has a plain-torch twin in ``reference.py`` that defines what it means; faster ones
live in ``cpu.py`` and, for CUDA, in ``triton/``. Callers import from here only. No operation
synchronises with the host except where its contract says that lengths are read on the host (CPU
tensors only).

Shapes: B requests, T query rows, S suffix rows, H query heads, K key/value heads, D head size,
M page-table columns, V vocabulary. A slot is one token's place in the KV cache:
slot = page * page_size + offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from aquiline.kernels import (
    cpu,
    reference,
    reference_adjust,
    reference_sampling,
    reference_training,
)
from aquiline.kernels.adjustments import (
    LOGPROB_COLUMNS,
    MAX_COUNT,
    MAX_ENDS,
    TOP_LOGPROBS,
    UNUSED,
    AdjustmentTable,
    Flag,
    History,
)
from aquiline.kernels.noise import NoiseKey, Stream, gumbel_noise, philox, uniform_noise
from aquiline.kernels.reference import rotary
from aquiline.kernels.reference_sampling import probabilities, scaled_scores

if torch.cuda.is_available():  # a CPU needs no Triton
    from aquiline.kernels.triton import adjust, attention, chain, elementwise, multi_round, sampling
    from aquiline.kernels.triton import divergence as laws
    from aquiline.kernels.triton import linear as skinny

__all__ = [
    "LOGPROB_COLUMNS",
    "MAX_COUNT",
    "MAX_ENDS",
    "TOP_LOGPROBS",
    "UNUSED",
    "AdjustmentTable",
    "Divergence",
    "Flag",
    "Followed",
    "History",
    "NoiseKey",
    "Norm",
    "Normed",
    "PackedWeight",
    "PendingRows",
    "Stream",
    "adjust_logits",
    "count_tokens",
    "divergence",
    "draw_top",
    "follow_matches",
    "gated_linear",
    "gumbel_noise",
    "linear",
    "merge_chain",
    "merge_chain_backward",
    "move_kv",
    "multi_round_accept",
    "pack_weight",
    "pending_rows",
    "philox",
    "plan_attention",
    "probabilities",
    "residual_linear",
    "rms_norm",
    "rotary",
    "rotary_linear",
    "rotary_write",
    "scaled_scores",
    "score_floor",
    "silu_mul",
    "slots_at",
    "token_logprobs",
    "tree_attention",
    "uniform_noise",
]  # fmt: skip

SKINNY_ROWS = 64  # rows of x up to which the skinny linear is faster than cuBLAS in a round
SPLIT_ROWS, SPLIT_WEIGHT = 32, 2**24  # rows and elements past which cuBLAS is, see _splits
PackedWeight = cpu.PackedWeight
pack_weight = cpu.pack_weight


class Norm(NamedTuple):
    """An RMS norm: weight [d] and eps."""

    weight: Tensor
    eps: float


class Normed(NamedTuple):
    """A vector x [..., d] that is read through a norm, if there is one.

    Where the kernel that wrote x prepared the norm: for few rows ``scaled`` is x * weight and
    ``squares`` [P, R] are shares of the sum of x^2 of each row, and a linear layer divides its
    result by rms(x); for many, ``ready`` is norm(x).
    """

    x: Tensor
    norm: Norm | None
    scaled: Tensor | None = None
    squares: Tensor | None = None
    ready: Tensor | None = None

    def value(self) -> Tensor:
        """norm(x)."""
        if self.ready is not None:
            return self.ready
        return self.x if self.norm is None else rms_norm(self.x, *self.norm)


def _fast(x: Tensor) -> bool:
    """Whether the Triton kernels serve this tensor: on CUDA, in a dtype they take, not training."""
    return x.is_cuda and not torch.is_grad_enabled() and x.dtype != torch.float64


def _skinny(x: Tensor) -> bool:
    """Whether x is for the skinny linear: few rows in half precision. In fp32 cuBLAS has IEEE
    products that Triton's tensor-core kernel would have to emulate."""
    return _fast(x) and x.dtype != torch.float32 and x.numel() // x.shape[-1] <= SKINNY_ROWS


def _splits(x: Tensor, weight: Tensor) -> bool:
    """Whether this product onto the residual stream is for cuBLAS all the same: its columns alone
    do not fill the card, and with many rows it pays to split K as well."""
    return x.numel() // x.shape[-1] > SPLIT_ROWS and weight.numel() >= SPLIT_WEIGHT


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] / rms(x) * weight [d], the mean square taken in fp32 at least."""
    if _fast(x):
        return elementwise.rms_norm(x, weight, eps)
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        return cpu.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2i] -> silu(gate) * up [..., i]."""
    if _fast(gate_up):
        return elementwise.silu_mul(gate_up)
    return reference.silu_mul(gate_up)


def linear(
    x: Tensor | Normed,
    weight: Tensor,
    bias: Tensor | None = None,
    packed: PackedWeight | None = None,
) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]; [..., out].

    ``packed`` is what ``pack_weight(weight)`` returned, or None.
    """
    source = x if isinstance(x, Normed) else Normed(x, None)
    if _skinny(source.x):
        return _skinny_linear(source, weight, bias)
    value = source.value()
    if packed is not None:
        return cpu.packed_linear(value, packed, bias)
    return reference.linear(value, weight, bias)


def gated_linear(x: Tensor | Normed, weight: Tensor, packed: PackedWeight | None = None) -> Tensor:
    """silu(gate) * up [..., i] of [gate, up] = linear(x, weight [2i, in])."""
    source = x if isinstance(x, Normed) else Normed(x, None)
    if _skinny(source.x):
        return _skinny_linear(source, weight, None, gated=True)
    return silu_mul(linear(source, weight, None, packed))


def residual_linear(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    norm: Norm | None,
    packed: PackedWeight | None = None,
) -> Normed:
    """residual [..., out] + linear(x, weight), to be read through ``norm``."""
    if _skinny(x) and not _splits(x, weight):
        scale = None if norm is None else norm.weight
        out = skinny.skinny_linear(x, weight, residual=residual, next_weight=scale)
        return Normed(out[0], norm, out[1], out[2])
    if packed is not None:
        return Normed(cpu.packed_linear(x, packed, None, residual), norm)
    product = reference.linear(x, weight, None)
    if norm is not None and _fast(x):
        total, normed = elementwise.add_norm(product, residual, *norm)
        return Normed(total, norm, ready=normed)
    return Normed(residual + product, norm)


def _skinny_linear(
    source: Normed, weight: Tensor, bias: Tensor | None, gated: bool = False
) -> Tensor:
    scaled, squares, eps = _prepared(source)
    return skinny.skinny_linear(scaled, weight, bias, squares, eps, gated=gated)[0]


def _prepared(source: Normed) -> tuple[Tensor, Tensor | None, float]:
    """x as the skinny linear reads it: scaled, with its squares and eps; or normed already."""
    if source.scaled is None or source.norm is None:
        return source.value(), None, 0.0
    return source.scaled, source.squares, source.norm.eps


def rotary_linear(
    x: Tensor | Normed,
    weight: Tensor,
    bias: Tensor | None,
    packed: PackedWeight | None,
    cos: Tensor,
    signed_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """``rotary_write`` of the heads linear(x, weight [(H + 2K) * D, in]): the queries."""
    source = x if isinstance(x, Normed) else Normed(x, None)
    size = cos.shape[-1]
    if _skinny(source.x) and skinny.fits_rotary(weight, size):
        scaled, squares, eps = _prepared(source)
        return skinny.skinny_rotary(
            scaled, weight, bias, squares, eps, cos, signed_sin, slots, k_cache, v_cache
        )
    heads = linear(source, weight, bias, packed)
    heads = heads.view(*heads.shape[:-1], -1, size)
    return rotary_write(heads, cos, signed_sin, k_cache, v_cache, slots)


def rotary_write(
    heads: Tensor, cos: Tensor, signed_sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> Tensor:
    """Rotate queries and keys of heads [B, T, H + 2K, D] by cos, signed_sin [B, T, 1, D]; write
    keys and values to the caches [slots, K, D] at slots [B * T]; return the queries [B, T, H, D].

    Slot 0 is a dustbin: several rows may write it.
    """
    if _fast(heads):
        return elementwise.rotary_write(heads, cos, signed_sin, k_cache, v_cache, slots)
    return reference.rotary_write(heads, cos, signed_sin, k_cache, v_cache, slots)


def slots_at(page_table: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Slots [B, T] of positions [B, T] through page_table [B, M]."""
    if positions.is_cuda:
        return elementwise.slots_at(page_table, positions, page_size)
    return reference.slots_at(page_table, positions, page_size)


class PendingRows(NamedTuple):
    """Where pending rows go: start [B]; positions and slots [B, P], 0 past a request's count."""

    start: Tensor
    positions: Tensor
    slots: Tensor


def pending_rows(
    page_table: Tensor, lengths: Tensor, counts: Tensor, width: int, page_size: int
) -> PendingRows:
    """``counts`` [B] rows of at most ``width`` = P, the last of them at ``lengths`` [B] - 1."""
    if lengths.is_cuda:
        return PendingRows(*elementwise.pending_rows(page_table, lengths, counts, width, page_size))
    return PendingRows(*reference.pending_rows(page_table, lengths, counts, width, page_size))


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


def move_kv(cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy slots source [B, n] of cache [L, 2, slots, K, D] to slots target [B, n], column by
    column; within a request no target is the source of a later column (a committed path)."""
    if _fast(cache):
        elementwise.move_kv(cache, source, target)
    else:
        reference.move_kv(cache, source, target)


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    page_size: int,
    prefix_lengths: Tensor,
    suffix_rows: int,
    suffix_mask: Tensor | None,
    plan: cpu.AttentionPlan | None = None,
) -> Tensor:
    """Attention of T rows per request over its cached prefix and, masked, over a suffix.

    The prefix (the first ``prefix_lengths`` slots of each request's pages) is seen whole by every
    row, so its pass needs no mask; the suffix (the ``suffix_rows`` slots behind it, where the
    current rows or tree were written) is seen through ``suffix_mask``; both are merged by their
    log-sum-exp (PAPER: tree attention in two passes).

    Args:
        q: [B, T, H, D]; H is a multiple of K.
        k_cache, v_cache: [slots, K, D]; slots that are masked must hold finite numbers.
        page_table: [B, M] page ids.
        page_size: slots in a page.
        prefix_lengths: [B]; read on the host when q is on the CPU.
        suffix_rows: S; 0 for none.
        suffix_mask: bool [T, S] or [B, T, S]; True where row t sees suffix slot s. None with a
            suffix means causal (S == T). Each row must see at least one key in all.
        plan: on the CPU, what ``plan_attention`` returned for these arguments.

    Returns:
        [B, T, H, D] in q's dtype.
    """
    if plan is not None:
        return cpu.run_attention(q, k_cache, v_cache, plan)
    arguments = q, k_cache, v_cache, page_table, page_size, prefix_lengths, suffix_rows, suffix_mask
    if _fast(q):
        return attention.tree_attention(*arguments)
    attend = cpu.tree_attention if q.device.type == "cpu" else reference.tree_attention
    return attend(*arguments)


def plan_attention(
    page_table: Tensor,
    page_size: int,
    prefix_lengths: Tensor,
    suffix_rows: int,
    suffix_mask: Tensor | None,
) -> cpu.AttentionPlan | None:
    """What ``tree_attention`` can prepare once for all layers of a pass; None off the CPU."""
    if page_table.device.type != "cpu":
        return None
    return cpu.plan_attention(page_table, page_size, prefix_lengths, suffix_rows, suffix_mask)


# ------------------------------------------------------------------------------------ sampling
#
# Twins in ``reference_sampling.py``. B requests, N rows each. The score of a token is
# logits / temperature in fp32 (fp64 for fp64 logits); greedy rows (temperature 0) are undivided.
# On CUDA every parameter is read on the device, row by row: a graph serves any batch.


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
    if _on_triton(logits):
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
    if _on_triton(logits):
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
    if _on_triton(target_logits):
        accept = multi_round.multi_round_accept
    return accept(
        target_logits, target_floor, draft_logits, draft_floor, tokens, temperature, children,
        draft_rows, draft_columns, accept_key, residual_key,
    )  # fmt: skip


# ----------------------------------------------------------------------------------- adjustments
#
# Twins in ``reference_adjust.py``. B requests; ``slots`` [B] int64 is the row of each in the table,
# -1 for none. A row without a slot, or without the flags that matter, costs a kernel's early exit.


def adjust_logits(
    logits: Tensor,
    table: AdjustmentTable,
    slots: Tensor,
    positions: Tensor,
    levels: Tensor | None,
    history: History | None,
    token_ids: Tensor | None,
    raw: Tensor | None,
) -> None:
    """Adjust logits [B, N, V] in place, as adjustments.py says; banned tokens get -inf.

    Computed in fp32 and rounded to the logits' dtype once.

    Args:
        positions: [B, P] absolute position of the token to be drawn; ``levels`` [N] is the column
            of each row of logits; None: column n for row n.
        history: the tokens between root and row; None: there are none.
        token_ids: [V] the token that each index stands for; None: itself.
        raw: [B, N, V] contiguous; gets the logits as they were, of requests that are adjusted and
            want log-probabilities. None: nobody does.
    """
    run = adjust.adjust_logits if _on_triton(logits) else reference_adjust.adjust_logits
    run(logits, table, slots, positions, levels, history, token_ids, raw)


def count_tokens(table: AdjustmentTable, slots: Tensor, tokens: Tensor, how_many: Tensor) -> None:
    """The first ``how_many`` [B] of tokens [B, L] were said: counted where penalties need it."""
    run = adjust.count_tokens if tokens.is_cuda else reference_adjust.count_tokens
    run(table, slots, tokens, how_many)


def token_logprobs(
    logits: Tensor,
    raw: Tensor | None,
    table: AdjustmentTable | None,
    slots: Tensor | None,
    path: Tensor | None,
    chosen: Tensor,
) -> Tensor:
    """Log-probabilities under the raw logits, [B, L, LOGPROB_COLUMNS] fp32.

    In order: that of the chosen token; its rank, from 1; those of the TOP_LOGPROBS likeliest; their
    ids (exact in fp32 up to 2^24). Ties go to the lowest id; past a smaller vocabulary -inf and -1.
    Rows of requests that want none may hold anything.

    Args:
        logits: [B, N, V] after ``adjust_logits`` with ``raw``.
        table, slots: None: every row is wanted, and nothing was adjusted.
        path: [B, L] the row of logits for each token; None: row l for token l.
        chosen: [B, L].
    """
    run = adjust.token_logprobs if _on_triton(logits) else reference_adjust.token_logprobs
    return run(logits, raw, table, slots, path, chosen)


# ------------------------------------------------------------------------------------ training
#
# Twins in ``reference_training.py``. C positions of S unrolled steps.

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
    compute = laws.divergence if _on_triton(draft) else reference_training.divergence
    return compute(draft, target, token_ids, weights, kind, eta)


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
    merge = chain.merge_chain if _on_triton(q) else reference_training.merge_chain
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
    if _on_triton(q):
        share = chain.merge_chain_backward
    return share(grad, q, out, lse, keys, values, dq)


def _on_triton(logits: Tensor) -> bool:
    """The kernels compute in fp32: float64 keeps to the twins."""
    return logits.is_cuda and logits.dtype != torch.float64
