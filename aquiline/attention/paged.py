"""PagedAttention: one forward pass of new rows over a paged prefix (inference).

The plan fixes, once per pass, where the rows' keys go and what each row may see; ``run`` is then
called by every layer. Rows see their request's whole prefix (unmasked) and, under a mask, the slots
behind it, where this pass and earlier ones of the same tree wrote their rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aquiline.attention.backend import Angles, Projection
from aquiline.kernels import ops
from aquiline.kvcache.pool import KVPlane


@dataclass(frozen=True)
class TreePlan:
    """What one pass of T rows per request writes and sees.

    Attributes:
        page_table: [B, M] page ids.
        prefix_lengths: [B] cached tokens that every row of the request sees.
        slots: [B, T] where the rows' keys and values are written.
        suffix_rows: S, slots behind the prefix that are seen through the mask; 0 for none (the
            rows' own slots then lie inside ``prefix_lengths``).
        mask: bool [T, S] or [B, T, S], which suffix slots each row sees; None is causal.
    """

    page_table: Tensor
    prefix_lengths: Tensor
    slots: Tensor
    suffix_rows: int
    mask: Tensor | None = None


class PagedAttention:
    """The attention of one pass over one model's plane of the cache."""

    def __init__(self, plane: KVPlane, plan: TreePlan) -> None:
        self.plane, self.plan = plane, plan
        self._slots = plan.slots.flatten()
        self._prepared = ops.plan_attention(
            plan.page_table, plane.page_size, plan.prefix_lengths, plan.suffix_rows, plan.mask
        )

    def run(
        self, layer: int, x: Tensor | ops.Normed, project: Projection, kv_heads: int, angles: Angles
    ) -> Tensor:
        """See Attention; this pass's keys and values enter the cache."""
        plan, (k_cache, v_cache) = self.plan, self.plane.layer(layer)
        assert kv_heads == k_cache.shape[1]
        q = project.into_cache(x, angles, k_cache, v_cache, self._slots)
        return ops.tree_attention(
            q, k_cache, v_cache, plan.page_table, self.plane.page_size, plan.prefix_lengths,
            plan.suffix_rows, plan.mask, self._prepared,
        )  # fmt: skip
