"""Looking up a request's own text for what may come next.

The text lies in pages, token by token, as keys and values do. Twin: ``reference_retrieval.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquiline.kernels import reference_retrieval

if torch.cuda.is_available():
    from aquiline.kernels.triton import retrieval


def ngram_match(
    tokens: Tensor,
    page_table: Tensor,
    page_size: int,
    lengths: Tensor,
    longest: int,
    shortest: int,
    count: int,
) -> Tensor:
    """What followed the latest earlier occurrence of the text's last tokens: [B, count] int64.

    The text of a request is what lies at positions 0 .. ``lengths`` [B], the newest token included.
    Its last ``longest`` tokens are looked for; where they do not stand once more, fewer, down to
    ``shortest``; where even those do not, the newest token counts as seen just before it. What the
    text does not hold yet is filled in as if it repeated itself from the found place on.

    Args:
        tokens: [slots] int32 by slot; page_table: [B, M]; lengths: at least 1, below 2^28; read on
            the host when they are on the CPU.
        longest, shortest: 3 >= longest >= shortest >= 1.
    """
    assert 3 >= longest >= shortest >= 1
    match = retrieval.ngram_match if tokens.is_cuda else reference_retrieval.ngram_match
    return match(tokens, page_table, page_size, lengths, longest, shortest, count)
