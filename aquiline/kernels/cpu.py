"""CPU versions: oneDNN's prepacked linear and torch's flash attention.

Two facts make a CPU fast at speculation. A weight packed once for oneDNN streams through the cache
at the same speed for 1 to 8 rows, so verifying a small tree costs little more than decoding one
token. And pages that follow each other in the pool are one strided view, so attention copies
nothing (a fragmented page list is gathered).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.kernels import reference

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class PackedWeight:
    """A weight [out, in] in oneDNN's blocked layout."""

    blocked: Tensor
    out_features: int


def pack_weight(weight: Tensor) -> PackedWeight | None:
    """The weight in oneDNN's layout, or None where that cannot help (other device or dtype)."""
    low_precision = weight.dtype == torch.bfloat16 and native_bf16()
    if weight.device.type != "cpu" or not (weight.dtype == torch.float32 or low_precision):
        return None
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 4)
    return PackedWeight(blocked, weight.shape[0])


def native_bf16() -> bool:
    """Whether this processor multiplies bf16 natively (AVX512-BF16 or AMX)."""
    cpu = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def packed_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """x times weight, plus bias, plus residual, in one oneDNN call."""
    multiply, packed = torch.ops.mkldnn._linear_pointwise, weight.blocked
    out: Tensor = (
        multiply(x, packed, bias, "none", [], "")
        if residual is None
        else multiply.binary(x, residual, packed, bias, "add")
    )
    return out


@dataclass(frozen=True)
class AttentionPlan:
    """Where each request's keys lie and what its rows may see, the same for every layer.

    Attributes:
        slots: per request, a slice of adjacent slots (a view of the cache) or their indices.
        masks: per request, bool [T, S] over the last S of its slots; None where all is seen.
        causal: the keys are the rows themselves, in order: flash attention's own causal mode.
        additive: the masks as flash attention takes them, made when the first layer runs.
    """

    slots: tuple[slice | Tensor, ...]
    masks: tuple[Tensor | None, ...]
    causal: bool
    additive: list[Tensor | None]


def plan_attention(
    page_table: Tensor,
    page_size: int,
    prefix_lengths: Tensor,
    suffix_rows: int,
    suffix_mask: Tensor | None,
) -> AttentionPlan:
    """See ops.plan_attention. One call per request then covers prefix and suffix together: on the
    CPU a mask is cheaper than a second call and a merge."""
    slots: list[slice | Tensor] = []
    lengths = prefix_lengths.tolist()
    for length, pages in zip(lengths, page_table.tolist(), strict=True):
        count = length + suffix_rows
        first, used = pages[0], -(-count // page_size)
        if pages[:used] == list(range(first, first + used)):
            slots.append(slice(first * page_size, first * page_size + count))
        else:
            table = torch.tensor([pages + [0] * (used - len(pages))])
            slots.append(reference.prefix_slots(table, page_size)[0, :count])
    causal = suffix_mask is None and suffix_rows > 0 and not any(lengths)
    masks: tuple[Tensor | None, ...] = (None,) * len(lengths)
    if suffix_rows and not causal:
        visible = reference.suffix_visibility(
            suffix_mask, len(lengths), suffix_rows, page_table.device
        )
        masks = tuple(None if bool(mask.all()) else mask for mask in visible)
    return AttentionPlan(tuple(slots), masks, causal, [])


def run_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan) -> Tensor:
    """Flash attention, request by request; see ops.tree_attention."""
    batch, rows, heads, size = q.shape
    kv_heads = k_cache.shape[1]
    group = heads // kv_heads
    if plan.causal:
        packed = q.transpose(1, 2)
    else:  # query heads that share a key head become rows: [B, K, T * G, D], row t * G + g
        packed = q.view(batch, rows, kv_heads, group, size).transpose(1, 2)
        packed = packed.reshape(batch, kv_heads, rows * group, size)
        if not plan.additive:
            plan.additive.extend(_additive_masks(plan, group, q.dtype))
    outs = []
    for b, slots in enumerate(plan.slots):
        keys, values = k_cache[slots].transpose(0, 1)[None], v_cache[slots].transpose(0, 1)[None]
        query = packed if batch == 1 else packed[b : b + 1]
        if plan.causal:
            outs.append(_flash(query, keys, values, is_causal=True)[0])
        else:
            outs.append(_flash(query, keys, values, attn_mask=plan.additive[b])[0])
    out = outs[0] if batch == 1 else torch.cat(outs)
    if plan.causal:
        return out.transpose(1, 2)
    out = out.view(batch, kv_heads, rows, group, size).transpose(1, 2)
    return out.reshape(batch, rows, heads, size)


def _additive_masks(plan: AttentionPlan, group: int, dtype: torch.dtype) -> list[Tensor | None]:
    """0 where a packed row [T * G] sees a slot, -inf where it does not."""
    masks: list[Tensor | None] = []
    for slots, visible in zip(plan.slots, plan.masks, strict=True):
        if visible is None:
            masks.append(None)
            continue
        count = slots.stop - slots.start if isinstance(slots, slice) else len(slots)
        mask = torch.zeros(visible.shape[0] * group, count, dtype=dtype)
        hidden = ~visible.repeat_interleave(group, dim=0)
        mask[:, count - visible.shape[1] :].masked_fill_(hidden, float("-inf"))
        masks.append(mask)
    return masks


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    page_size: int,
    prefix_lengths: Tensor,
    suffix_rows: int,
    suffix_mask: Tensor | None,
) -> Tensor:
    plan = plan_attention(page_table, page_size, prefix_lengths, suffix_rows, suffix_mask)
    return run_attention(q, k_cache, v_cache, plan)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """torch's own is eight small operators on the CPU. The mean square of x is the variance of
    [x, -x], whose mean is zero, so one fused layer norm does it (accumulating in fp32)."""
    size = x.shape[-1]
    both = torch.cat((x, -x), dim=-1)
    return torch.layer_norm(both, (2 * size,), None, None, eps)[..., :size] * weight
