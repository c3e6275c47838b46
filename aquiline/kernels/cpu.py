"""CPU versions: oneDNN's prepacked linear and torch's flash attention.

Two facts make a CPU fast at speculation. A weight packed once for oneDNN streams through the cache
at the same speed for 1 to 8 rows, so verifying a small tree costs little more than decoding one
token. And pages that follow each other in the pool are one strided view, so the prefix pass
copies nothing (a fragmented page list is gathered).
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


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight.blocked, bias, "none", [], "")
    return out


def _state(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Flash attention with log-sum-exp: q [B,K,R,D], k, v [B,S,K,D], additive mask [.., R, S]."""
    out, lse = _flash(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out, lse


def _prefix(cache: Tensor, pages: list[int], page_size: int, length: int) -> Tensor:
    """The first ``length`` slots of the pages, [1, length, K, D]; a view if they are adjacent."""
    first, used = pages[0], -(-length // page_size)
    if pages[:used] == list(range(first, first + used)):
        return cache[None, first * page_size : first * page_size + length]
    table = torch.tensor([pages[:used]])
    return cache[reference.prefix_slots(table, page_size)[:, :length]]


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
    batch, rows, heads, size = q.shape
    kv_heads = k_cache.shape[1]
    group = heads // kv_heads
    # Query heads that share a key head become rows: [B, K, T * G, D], row t * G + g.
    packed = q.view(batch, rows, kv_heads, group, size).transpose(1, 2)
    packed = packed.reshape(batch, kv_heads, rows * group, size)
    lengths, tables = prefix_lengths.tolist(), page_table.tolist()
    outs, lses = [], []
    for b, (length, pages) in enumerate(zip(lengths, tables, strict=True)):
        if length == 0:
            outs.append(torch.zeros_like(packed[b : b + 1]))
            lses.append(packed.new_full((1, kv_heads, rows * group), float("-inf")))
            continue
        keys = _prefix(k_cache, pages, page_size, length)
        values = _prefix(v_cache, pages, page_size, length)
        out, lse = _state(packed[b : b + 1], keys, values, None)
        outs.append(out)
        lses.append(lse)
    out = torch.cat(outs) if batch > 1 else outs[0]
    if k_suffix is not None and v_suffix is not None:
        lse = torch.cat(lses) if batch > 1 else lses[0]
        visible = reference.suffix_visibility(suffix_mask, batch, rows, q.device)
        visible = visible[:, None].repeat_interleave(group, dim=2)
        mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
        suffix_out, suffix_lse = _state(packed, k_suffix, v_suffix, mask)
        out = reference.merge_states(out, lse.to(out.dtype), suffix_out, suffix_lse.to(out.dtype))
    out = out.view(batch, kv_heads, rows, group, size).transpose(1, 2)
    return out.reshape(batch, rows, heads, size)
