"""The public operations of the engine: signatures, contracts, dispatch by device.

Every operation has a plain-torch twin in ``reference.py`` that defines what it means; a faster one
for the CPU lives in ``cpu.py``. Callers import from here only. No operation synchronises with the
host except where its contract says that lengths are read on the host (CPU tensors only).

Shapes: B requests, T query rows, S suffix rows, H query heads, K key/value heads, D head size,
M page-table columns, V vocabulary. A slot is one token's place in the KV cache:
slot = page * page_size + offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquiline.kernels import cpu, reference
from aquiline.kernels.noise import Stream, gumbel_noise, philox, uniform_noise
from aquiline.kernels.reference import rotary, silu_mul

__all__ = [
    "PackedWeight", "Stream", "gumbel_noise", "linear", "move_kv", "pack_weight", "philox",
    "plan_attention", "rms_norm", "rotary", "silu_mul", "tree_attention", "uniform_noise",
    "write_kv",
]  # fmt: skip

PackedWeight = cpu.PackedWeight
pack_weight = cpu.pack_weight
write_kv = reference.write_kv
move_kv = reference.move_kv


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] / rms(x) * weight [d], the mean square taken in fp32 at least."""
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        return cpu.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedWeight | None) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]; [..., out].

    ``packed`` is what ``pack_weight(weight)`` returned, or None.
    """
    if packed is not None:
        return cpu.packed_linear(x, packed, bias)
    return reference.linear(x, weight, bias)


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
    attend = cpu.tree_attention if q.device.type == "cpu" else reference.tree_attention
    return attend(
        q, k_cache, v_cache, page_table, page_size, prefix_lengths, suffix_rows, suffix_mask
    )


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
