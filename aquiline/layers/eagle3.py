"""The first layer of an EAGLE-3 draft: a decoder layer that reads two streams.

Attention reads [norm(embedding) ; norm(feature)], 2d wide; what it adds to is the feature itself
(or, ``norm_before_residual``, the normed one). From there on it is Llama's layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aquiline.attention.backend import Angles, Attention
from aquiline.kernels import ops
from aquiline.layers.attention import SelfAttention
from aquiline.layers.decoder import LayerShape
from aquiline.layers.mlp import MLP
from aquiline.layers.norm import RMSNorm


class Eagle3Layer(nn.Module):
    """x = feature + attention([norm(embedding) ; norm(feature)]), then x + mlp(norm(x))."""

    def __init__(self, shape: LayerShape, norm_before_residual: bool = False) -> None:
        super().__init__()
        hidden, eps = shape.hidden_size, shape.rms_norm_eps
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = RMSNorm(hidden, eps)
        self.hidden_norm = RMSNorm(hidden, eps)
        self.self_attn = SelfAttention(
            hidden, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.attention_bias,
            input_size=2 * hidden,
        )  # fmt: skip
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = MLP(hidden, shape.intermediate_size)

    def forward(
        self,
        embeddings: Tensor,
        features: Tensor,
        next_norm: ops.Norm | None,
        angles: Angles,
        attention: Attention,
        layer: int,
    ) -> ops.Normed:
        """embeddings, features [B, T, hidden] -> [B, T, hidden], read through ``next_norm``."""
        normed = self.hidden_norm(features)
        both = torch.cat((self.input_layernorm(embeddings), normed), dim=-1)
        residual = normed if self.norm_before_residual else features
        norm = self.post_attention_layernorm.fused
        x = self.self_attn(ops.Normed(both, None), residual, norm, angles, attention, layer)
        out: ops.Normed = self.mlp(x, next_norm)
        return out
