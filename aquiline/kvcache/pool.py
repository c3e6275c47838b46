"""KVPool: the tensors behind the pages, one plane for the target and one for the draft.

Both planes share page ids: a page of a sequence holds the target's and the draft's keys and values
of the same positions, so one table serves both. A plane is [layers, 2, slots, kv_heads, head_dim].
Where rounds look up a request's own text, the tokens lie in a third plane: shared, copied and freed
with the pages, like the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.kernels import ops


@dataclass(frozen=True)
class PlaneShape:
    """What one model stores per token."""

    layers: int
    kv_heads: int
    head_dim: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * dtype.itemsize


class KVPlane:
    """Keys and values of one model."""

    def __init__(
        self,
        shape: PlaneShape,
        slots: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        size = (shape.layers, 2, slots, shape.kv_heads, shape.head_dim)
        self.data = torch.zeros(size, dtype=dtype, device=device)
        self.page_size = page_size
        self._layers = [(layer[0], layer[1]) for layer in self.data]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [slots, kv_heads, head_dim] of one layer; views."""
        return self._layers[index]

    def commit_path(self, source: Tensor, target: Tensor) -> None:
        """Move accepted nodes from slots source [B, n] to slots target [B, n], in every layer."""
        ops.move_kv(self.data, source, target)

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page in every layer (a text that begins like another one and goes on apart)."""
        size = self.page_size
        self.data[:, :, target * size : (target + 1) * size] = self.data[
            :, :, source * size : (source + 1) * size
        ]


class TokenPlane:
    """Token ids by slot, [slots] int32."""

    def __init__(self, slots: int, page_size: int, device: torch.device) -> None:
        self.data = torch.zeros(slots, dtype=torch.int32, device=device)
        self.page_size = page_size

    def write(self, slots: Tensor, tokens: Tensor) -> None:
        """Tokens to slots, of one shape."""
        self.data[slots] = tokens.to(self.data.dtype)

    def copy_page(self, source: int, target: int) -> None:
        """See KVPlane.copy_page."""
        size = self.page_size
        self.data[target * size : (target + 1) * size] = self.data[
            source * size : (source + 1) * size
        ]
