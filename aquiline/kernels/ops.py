"""The public operations of the engine: signatures, contracts, dispatch by device.

Every operation has a plain-torch twin in ``reference.py`` that defines what it means; a faster one
for the CPU lives in ``cpu.py``. Callers import from here only. No operation synchronises with the
host except where its contract says that lengths are read on the host (CPU tensors only).

Shapes: B requests, T query rows, S suffix rows, H query heads, K key/value heads, D head size,
M page-table columns, V vocabulary. A slot is one token's place in the KV cache:
slot = page * page_size + offset.
"""

from __future__ import annotations

from torch import Tensor

from aquiline.kernels import cpu, reference
from aquiline.kernels.reference import Stream, philox, rms_norm, rotary, silu_mul

__all__ = [
    "PackedWeight", "Stream", "gumbel_noise", "linear", "move_kv", "pack_weight", "philox",
    "rms_norm", "rotary", "silu_mul", "tree_attention", "uniform_noise", "write_kv",
]  # fmt: skip

PackedWeight = cpu.PackedWeight
pack_weight = cpu.pack_weight
gumbel_noise = reference.gumbel_noise
uniform_noise = reference.uniform_noise
write_kv = reference.write_kv
move_kv = reference.move_kv


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
    k_suffix: Tensor | None,
    v_suffix: Tensor | None,
    suffix_mask: Tensor | None,
) -> Tensor:
    """Attention of T rows per request over its cached prefix and, masked, over a suffix.

    The prefix (the first ``prefix_lengths`` slots of each request's pages) is seen whole by every
    row, so its pass needs no mask; the suffix pass applies ``suffix_mask``; both are merged by
    their log-sum-exp (PAPER: tree attention in two passes).

    Args:
        q: [B, T, H, D]; H is a multiple of K.
        k_cache, v_cache: [slots, K, D].
        page_table: [B, M] page ids; entries beyond a request's prefix are never read.
        page_size: slots in a page.
        prefix_lengths: [B]; read on the host when q is on the CPU.
        k_suffix, v_suffix: [B, S, K, D], or None when there is no suffix.
        suffix_mask: bool [T, S] or [B, T, S]; True where row t sees suffix row s. None with a
            suffix means causal (S == T). Each row must see at least one key in all.

    Returns:
        [B, T, H, D] in q's dtype.
    """
    attend = cpu.tree_attention if q.device.type == "cpu" else reference.tree_attention
    return attend(
        q, k_cache, v_cache, page_table, page_size, prefix_lengths, k_suffix, v_suffix, suffix_mask
    )
