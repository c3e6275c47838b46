"""Rotary positions: the angle tables, with Llama 3's frequency scaling.

Angles are computed in fp32 from integer positions, as the checkpoints were trained. Pair (i, i +
head_dim / 2) turns by position * theta^(-2i / head_dim), divided by the checkpoint's scaling factor
of that frequency.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aquiline.attention.backend import Angles


class RotaryEmbedding(nn.Module):
    """Positions [B, T] -> Angles. ``inverse_frequencies`` [D / 2] already carry any scaling."""

    table: Tensor

    def __init__(self, inverse_frequencies: Tensor, max_positions: int) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(max_positions).float(), inverse_frequencies.float())
        cos, sin = angles.cos(), angles.sin()
        table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
        self.register_buffer("table", table[:, :, None], persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        rows = F.embedding(positions, self.table.flatten(1)).to(dtype)
        cos, signed_sin = rows.view(*positions.shape, *self.table.shape[1:]).unbind(2)
        return Angles(cos, signed_sin)
