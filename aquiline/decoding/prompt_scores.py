"""Log-probabilities of a prompt's tokens, from the features that its prefill computed anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from aquiline.kernels import ops
from aquiline.models.llama import Llama

CHUNK = 256  # positions at a time: the logits of a whole prompt never exist at once


@torch.inference_mode()
def prompt_logprobs(target: Llama, features: Tensor, said: Tensor) -> Tensor:
    """Features [T, d], and the token that followed each, said [T] -> [T, C], see
    ops.token_logprobs."""
    count = len(said)
    parts = [torch.empty(0, ops.LOGPROB_COLUMNS, device=said.device)]
    for start in range(0, count, CHUNK):
        rows = slice(start, min(start + CHUNK, count))
        logits = target.logits(features[None, rows])
        parts.append(ops.token_logprobs(logits, None, None, None, None, said[None, rows])[0])
    return torch.cat(parts)
