"""The attention of packed documents, for models of transformers.

Registered with transformers as ``aquiline_packed``: causal inside each document and windowed where
the layer is, with the documents' edges handed through the model as ``cu_seq_lens_q``. No mask of
the whole batch is ever built.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from aquiline.attention.packed import attend_documents

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
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    edges, longest = rest["cu_seq_lens_q"], int(rest["max_length_q"])
    return attend_documents(q, k, v, edges, longest, scaling, sliding_window)[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """The edges say it all."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)
