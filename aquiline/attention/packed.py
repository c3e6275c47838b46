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
        self.edges = cu_seqlens.tolist() if cu_seqlens.device.type == "cpu" else []

    def run(
        self, layer: int, x: Tensor | ops.Normed, project: Projection, kv_heads: int, angles: Angles
    ) -> Tensor:
        """See Attention; B is 1, and the layer does not matter here."""
        heads = project(x)
        heads = heads.view(*heads.shape[:-1], -1, angles.cos.shape[-1])
        kv = kv_heads
        turned = ops.rotary(heads[:, :, :-kv], angles.cos, angles.signed_sin)
        q, k, v = turned[:, :, :-kv], turned[:, :, -kv:], heads[:, :, -kv:]
        if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
            cu, longest = self.cu_seqlens, self.max_seqlen
            out: Tensor = torch.ops.aten._flash_attention_forward(
                q[0], k[0], v[0], cu, cu, longest, longest, 0.0, True, False
            )[0]
            return out[None]
        edges = self.edges or self.cu_seqlens.tolist()
        parts = []
        for start, end in itertools.pairwise(edges):
            dq, dk, dv = (x[:, start:end].transpose(1, 2) for x in (q, k, v))
            parts.append(
                F.scaled_dot_product_attention(dq, dk, dv, is_causal=True, enable_gqa=True)
            )
        return torch.cat(parts, dim=2).transpose(1, 2)
