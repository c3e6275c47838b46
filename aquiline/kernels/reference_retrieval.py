"""Plain-torch twin of the look-up in a request's own text. Contract: ops.retrieval.

On the CPU it is the version in use: it reads the lengths on the host and looks no further.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquiline.kernels.reference import prefix_slots


def ngram_match(
    tokens: Tensor,
    page_table: Tensor,
    page_size: int,
    lengths: Tensor,
    longest: int,
    shortest: int,
    count: int,
) -> Tensor:
    pages = int(lengths.max()) // page_size + 1
    text = tokens[prefix_slots(page_table[:, :pages], page_size)].long()  # [B, L]
    columns = torch.arange(text.shape[1], device=text.device)
    same = columns < lengths[:, None]  # where the last k tokens stand once more, by their end
    found = lengths - 1
    for back in range(longest):
        wanted = text.gather(1, (lengths - back).clamp_min(0)[:, None])
        shifted = text.roll(back, dims=1)
        same = same & (columns >= back) & (shifted == wanted)
        if back + 1 >= shortest:
            latest = torch.where(same, columns, -1).amax(dim=1)
            found = torch.where(latest >= 0, latest, found)
    ahead = torch.arange(count, device=text.device) % (lengths - found)[:, None]
    return text.gather(1, found[:, None] + 1 + ahead)
