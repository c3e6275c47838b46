"""Plain-torch twins of every operation: the definition that the fast kernels are tested against.

Differentiable where training needs it, exact in float64, and with the full ragged contract.
Attention softmax and norms are computed in fp32 at least. See ops for the contracts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------- dense layers


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] / rms(x) * weight [d], the mean square taken in fp32 at least."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2i] -> silu(gate) * up [..., i]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotary(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotate heads x [B, T, H, D] by cos, signed_sin [B, T, 1, D] (halves convention).

    ``signed_sin`` carries the minus sign of the first half, so that rotate_half is a roll.
    """
    return torch.addcmul(x * cos, torch.roll(x, x.shape[-1] // 2, dims=-1), signed_sin)


def rotary_split(
    heads: Tensor, cos: Tensor, signed_sin: Tensor, kv_heads: int
) -> tuple[Tensor, ...]:
    turned = rotary(heads[:, :, :-kv_heads], cos, signed_sin)
    q, k = turned[:, :, :-kv_heads], turned[:, :, -kv_heads:]
    return q.flatten(0, 1), k.flatten(0, 1), heads[:, :, -kv_heads:].flatten(0, 1)


# ---------------------------------------------------------------------------------- attention


def attention_state(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with its log-sum-exp: q [B,T,H,D], k, v [B,S,K,D], mask [B,T,S] bool.

    Returns (out [B,T,H,D], lse [B,T,H]), fp32 at least; a row that sees nothing has out 0 and
    lse -inf. The H/K query heads that share a key head are packed as rows of one product.
    """
    batch, rows, heads, size = q.shape
    kv_heads = k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).view(batch, rows, kv_heads, heads // kv_heads, size)
    scores = torch.einsum("btkgd,bskd->btkgs", grouped, k.to(dtype)) * size**-0.5
    scores = scores.masked_fill(~mask[:, :, None, None, :], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.clamp_min(torch.finfo(dtype).min)[..., None])
    out = torch.einsum("btkgs,bskd->btkgd", weights, v.to(dtype))
    return out.reshape(q.shape), lse.reshape(batch, rows, heads)


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> Tensor:  # the softmax over the union of two key sets
    """out [..., D] of the union, from each part's out [..., D] and lse [...]."""
    return torch.lerp(out_b, out_a, torch.sigmoid(lse_a - lse_b)[..., None])


def prefix_slots(page_table: Tensor, page_size: int) -> Tensor:
    """Slots [B, M * page_size] of the pages [B, M], in order."""
    offsets = torch.arange(page_size, device=page_table.device)
    return (page_table[:, :, None] * page_size + offsets).flatten(1)


def suffix_visibility(mask: Tensor | None, batch: int, rows: int, device: torch.device) -> Tensor:
    """The suffix mask as bool [B, T, S]; None is causal."""
    if mask is None:
        mask = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    return mask.expand(batch, *mask.shape[-2:])


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
    batch, rows = q.shape[:2]
    slots = prefix_slots(page_table, page_size)
    in_prefix = torch.arange(slots.shape[1], device=q.device) < prefix_lengths[:, None]
    prefix = torch.where(in_prefix, slots, 0)
    visible = in_prefix[:, None, :].expand(batch, rows, -1)
    out, lse = attention_state(q, k_cache[prefix], v_cache[prefix], visible)
    if suffix_rows:
        columns = prefix_lengths[:, None] + torch.arange(suffix_rows, device=q.device)
        suffix = slots.gather(1, columns.clamp(max=slots.shape[1] - 1))
        mask = suffix_visibility(suffix_mask, batch, rows, q.device)
        state = attention_state(q, k_cache[suffix], v_cache[suffix], mask)
        out = merge_states(out, lse, *state)
    return out.to(q.dtype)


# ------------------------------------------------------------------------------------ KV cache


def rotary_write(
    heads: Tensor, cos: Tensor, signed_sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> Tensor:
    kv_heads = k_cache.shape[1]
    turned = rotary(heads[:, :, :-kv_heads], cos, signed_sin)
    k_cache.index_copy_(0, slots, turned[:, :, -kv_heads:].flatten(0, 1))
    v_cache.index_copy_(0, slots, heads[:, :, -kv_heads:].flatten(0, 1))
    return turned[:, :, :-kv_heads]


def slots_at(page_table: Tensor, positions: Tensor, page_size: int) -> Tensor:
    pages = torch.gather(page_table, 1, positions // page_size)
    return pages * page_size + positions % page_size


def pending_rows(
    page_table: Tensor, lengths: Tensor, counts: Tensor, width: int, page_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    columns = torch.arange(width, device=lengths.device)
    start = lengths - counts
    valid = columns < counts[:, None]
    positions = torch.where(valid, start[:, None] + columns, 0)
    slots = torch.where(valid, slots_at(page_table, positions, page_size), 0)
    return start, positions, slots


def move_kv(cache: Tensor, source: Tensor, target: Tensor) -> None:
    cache.index_copy_(2, target.flatten(), cache.index_select(2, source.flatten()))
