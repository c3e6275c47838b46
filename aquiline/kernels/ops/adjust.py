"""Adjusted logits, and the scores of what was said.

Twins in ``reference_adjust.py``. B requests; ``slots`` [B] int64 is the row of each in the table,
-1 for none. A row without a slot, or without the flags that matter, costs a kernel's early exit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aquiline.kernels import reference_adjust
from aquiline.kernels.adjustments import AdjustmentTable, History
from aquiline.kernels.ops.device import on_triton

if torch.cuda.is_available():
    from aquiline.kernels.triton import adjust


def adjust_logits(
    logits: Tensor,
    table: AdjustmentTable,
    slots: Tensor,
    positions: Tensor,
    levels: Tensor | None,
    history: History | None,
    token_ids: Tensor | None,
    masks: Tensor | None,
    raw: Tensor | None,
) -> None:
    """Adjust logits [B, N, V] in place, as adjustments.py says; banned tokens get -inf.

    Computed in fp32 and rounded to the logits' dtype once.

    Args:
        positions: [B, P] absolute position of the token to be drawn; ``levels`` [N] is the column
            of each row of logits; None: column n for row n.
        history: the tokens between root and row; None: there are none.
        token_ids: [V] the token that each index stands for; None: itself.
        masks: [B, N, ceil(V / 32)] int32, contiguous: the tokens that the form allows, of requests
            that have one; bit t % 32 of word t // 32 stands for token t. None: nothing is known of
            what may come here.
        raw: [B, N, V] contiguous; gets the logits as they were, of requests that are adjusted and
            want log-probabilities. None: nobody does.
    """
    run = adjust.adjust_logits if on_triton(logits) else reference_adjust.adjust_logits
    run(logits, table, slots, positions, levels, history, token_ids, masks, raw)


def count_tokens(table: AdjustmentTable, slots: Tensor, tokens: Tensor, how_many: Tensor) -> None:
    """The first ``how_many`` [B] of tokens [B, L] were said: counted where penalties need it."""
    run = adjust.count_tokens if tokens.is_cuda else reference_adjust.count_tokens
    run(table, slots, tokens, how_many)


def token_logprobs(
    logits: Tensor,
    raw: Tensor | None,
    table: AdjustmentTable | None,
    slots: Tensor | None,
    path: Tensor | None,
    chosen: Tensor,
) -> Tensor:
    """Log-probabilities under the raw logits, [B, L, LOGPROB_COLUMNS] fp32.

    In order: that of the chosen token; its rank, from 1; those of the TOP_LOGPROBS likeliest; their
    ids (exact in fp32 up to 2^24). Ties go to the lowest id; past a smaller vocabulary -inf and -1.
    Rows of requests that want none may hold anything.

    Args:
        logits: [B, N, V] after ``adjust_logits`` with ``raw``.
        table, slots: None: every row is wanted, and nothing was adjusted.
        path: [B, L] the row of logits for each token; None: row l for token l.
        chosen: [B, L].
    """
    run = adjust.token_logprobs if on_triton(logits) else reference_adjust.token_logprobs
    return run(logits, raw, table, slots, path, chosen)
