"""PackedAttention: causal attention inside each document of a packed batch (training).

Documents lie one after another in a single row of N tokens; ``cu_seqlens`` holds their edges, so no
mask is ever built. Differentiable. On CUDA in half precision it is torch's variable-length flash
attention, elsewhere one call per document.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from aquiline.attention.backend import Angles, Projection
from aquiline.kernels import ops


class PackedAttention:
    """The attention of one packed batch of B = 1 row."""

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int) -> None:
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen

    def run(
        self, layer: int, x: Tensor | ops.Normed, project: Projection, kv_heads: int, angles: Angles
    ) -> Tensor:
        """See Attention; B is 1."""
        heads = project(x)
        heads = heads.view(*heads.shape[:-1], -1, angles.cos.shape[-1])
        q, k, v = ops.rotary_split(heads, angles.cos, angles.signed_sin, kv_heads)
        return self.attend(layer, q, k, v)[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotated q [N, H, D], k and v [N, K, D] -> [N, H, D]; the layer does not matter here."""
        return attend_documents(q, k, v, self.cu_seqlens, self.max_seqlen)


def attend_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """q [N, H, D], k and v [N, K, D] -> [N, H, D], causal inside each document.

    Args:
        scale: of the scores; None is D^-0.5.
        window: how many keys a query sees at most, its own included; None: all before it.
    """
    if flash_serves(q):
        left, right = (None, None) if window is None else (window - 1, 0)
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True, False,
            scale=scale, window_size_left=left, window_size_right=right,
        )[0]  # fmt: skip
        return out
    parts = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        dq, dk, dv = (x[None, start:end].transpose(1, 2) for x in (q, k, v))
        mask = None
        if window is not None and end - start > window:
            row = torch.arange(end - start, device=q.device)
            distance = row[:, None] - row
            mask = (distance >= 0) & (distance < window)
        parts.append(
            F.scaled_dot_product_attention(
                dq, dk, dv, mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
        )
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def flash_serves(q: Tensor) -> bool:
    """Whether torch's flash attention takes these queries."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
