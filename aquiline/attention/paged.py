"""PagedAttention: one forward pass of new rows over a paged prefix (inference).

``plan`` fixes, once per pass, where the rows' keys go and what each row may see; ``run`` is then
called by every layer. Rows see their request's whole prefix (unmasked) and, under a mask, a suffix:
by default the pass's own rows (prefill: causal; verification: ancestors), or rows of earlier passes
of the same tree, read back from the cache (drafting, level by level).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aquiline.kernels import ops
from aquiline.kvcache.pool import KVPlane


@dataclass(frozen=True)
class TreePlan:
    """What one pass of T rows per request writes and sees.

    Attributes:
        page_table: [B, M] page ids.
        prefix_lengths: [B] cached tokens that every row of the request sees.
        slots: [B, T] where the rows' keys and values are written.
        mask: bool [T, S] or [B, T, S], which suffix rows each row sees; None is causal.
        suffix_slots: [B, S] slots of the suffix, or None when the suffix is the pass's own rows.
        in_prefix: the rows' own slots already lie inside ``prefix_lengths``: no suffix at all.
    """

    page_table: Tensor
    prefix_lengths: Tensor
    slots: Tensor
    mask: Tensor | None = None
    suffix_slots: Tensor | None = None
    in_prefix: bool = False


class PagedAttention:
    """The attention of one pass over one model's plane of the cache."""

    def __init__(self, plane: KVPlane, plan: TreePlan) -> None:
        self.plane, self.plan = plane, plan

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B,T,H,D], k, v [B,T,K,D] of this pass -> [B,T,H,D]; k and v enter the cache."""
        plan, cache = self.plan, self.plane.layer(layer)
        ops.write_kv(cache, plan.slots, k, v)
        suffix_k: Tensor | None = k
        suffix_v: Tensor | None = v
        if plan.in_prefix:
            suffix_k = suffix_v = None
        elif plan.suffix_slots is not None:
            suffix_k, suffix_v = cache[0][plan.suffix_slots], cache[1][plan.suffix_slots]
        return ops.tree_attention(
            q, cache[0], cache[1], plan.page_table, self.plane.page_size, plan.prefix_lengths,
            suffix_k, suffix_v, plan.mask,
        )  # fmt: skip
