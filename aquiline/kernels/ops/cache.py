"""The paged cache: where tokens lie, moving them, attention over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aquiline.kernels import cpu, reference
from aquiline.kernels.ops.device import fast

if torch.cuda.is_available():
    from aquiline.kernels.triton import attention, elementwise


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


def move_kv(cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy slots source [B, n] of cache [L, 2, slots, K, D] to slots target [B, n], column by
    column; within a request no target is the source of a later column (a committed path)."""
    if fast(cache):
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
    if fast(q):
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
