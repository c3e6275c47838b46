"""The public operations of the engine: signatures, contracts, dispatch by device.

Every operation has a plain-torch twin in a ``reference`` module that defines what it means; faster
ones live in ``cpu.py`` and, for CUDA, in ``triton/``. Callers import from here only. No operation
synchronises with the host except where its contract says that lengths are read on the host (CPU
tensors only).

Shapes: B requests, T query rows, S suffix rows, H query heads, K key/value heads, D head size,
M page-table columns, V vocabulary. A slot is one token's place in the KV cache:
slot = page * page_size + offset.
"""

from __future__ import annotations

from aquiline.kernels.adjustments import (
    LOGPROB_COLUMNS,
    MAX_COUNT,
    MAX_ENDS,
    TOP_LOGPROBS,
    UNUSED,
    AdjustmentTable,
    Flag,
    History,
)
from aquiline.kernels.noise import NoiseKey, Stream, gumbel_noise, philox, uniform_noise
from aquiline.kernels.ops.adjust import adjust_logits, count_tokens, token_logprobs
from aquiline.kernels.ops.cache import (
    PendingRows,
    move_kv,
    pending_rows,
    plan_attention,
    slots_at,
    tree_attention,
)
from aquiline.kernels.ops.dense import (
    Norm,
    Normed,
    PackedWeight,
    gated_linear,
    linear,
    pack_weight,
    residual_linear,
    rms_norm,
    rotary_linear,
    rotary_split,
    rotary_write,
    silu_mul,
)
from aquiline.kernels.ops.retrieval import ngram_match
from aquiline.kernels.ops.sampling import (
    Followed,
    draw_top,
    follow_matches,
    multi_round_accept,
    score_floor,
)
from aquiline.kernels.ops.training import (
    Divergence,
    divergence,
    merge_chain,
    merge_chain_backward,
    regression,
)
from aquiline.kernels.reference_sampling import probabilities, scaled_scores

__all__ = [
    "LOGPROB_COLUMNS",
    "MAX_COUNT",
    "MAX_ENDS",
    "TOP_LOGPROBS",
    "UNUSED",
    "AdjustmentTable",
    "Divergence",
    "Flag",
    "Followed",
    "History",
    "NoiseKey",
    "Norm",
    "Normed",
    "PackedWeight",
    "PendingRows",
    "Stream",
    "adjust_logits",
    "count_tokens",
    "divergence",
    "draw_top",
    "follow_matches",
    "gated_linear",
    "gumbel_noise",
    "linear",
    "merge_chain",
    "merge_chain_backward",
    "move_kv",
    "multi_round_accept",
    "ngram_match",
    "pack_weight",
    "pending_rows",
    "philox",
    "plan_attention",
    "probabilities",
    "regression",
    "residual_linear",
    "rms_norm",
    "rotary_linear",
    "rotary_split",
    "rotary_write",
    "scaled_scores",
    "score_floor",
    "silu_mul",
    "slots_at",
    "token_logprobs",
    "tree_attention",
    "uniform_noise",
]  # fmt: skip
