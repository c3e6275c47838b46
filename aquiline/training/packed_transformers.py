"""The attention of packed documents, for models of transformers.

Registered with transformers as ``aquiline_packed``: causal inside each document and windowed where
the layer is, with the documents' edges handed through the model as ``cu_seq_lens_q``. On CUDA in
half precision it is torch's variable-length flash attention, elsewhere one call per document. No
mask of the whole batch is ever built.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "aquiline_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """query [1, H, N, D], key and value [1, K, N, D] -> [1, N, H, D].

    Raises NotImplementedError for attention with more than a scale and a window.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if rest.get(name) is not None]
    if unknown or "cu_seq_lens_q" not in rest:
        raise NotImplementedError(f"packed attention: {unknown or 'no edges of documents'}")
    edges: Tensor = rest["cu_seq_lens_q"]
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        longest = int(rest["max_length_q"])
        left = None if sliding_window is None else sliding_window - 1
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, edges, edges, longest, longest, 0.0, True, False, scale=scaling,
            window_size_left=left, window_size_right=None if left is None else 0,
        )[0]  # fmt: skip
        return out[None], None
    parts = []
    for start, end in itertools.pairwise(edges.tolist()):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        mask = None
        if sliding_window is not None and end - start > sliding_window:
            row = torch.arange(end - start, device=query.device)
            distance = row[:, None] - row
            mask = (distance >= 0) & (distance < sliding_window)
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    """The edges say it all."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)
