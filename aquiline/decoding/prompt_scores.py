"""Log-probabilities of a prompt's tokens, from the features that its prefill computed anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from aquiline.kernels import ops
from aquiline.models.llama import Llama

CHUNK = 256  # positions at a time: the logits of a whole prompt never exist at once


@torch.inference_mode()
def prompt_logprobs(target: Llama, features: Tensor, tokens: Tensor) -> Tensor:
    """Features [T, d] after each of tokens [T] -> [T - 1, C] of the tokens from the second on, see
    ops.token_logprobs."""
    count = len(tokens) - 1
    parts = [torch.empty(0, ops.LOGPROB_COLUMNS, device=tokens.device)]
    for start in range(0, count, CHUNK):
        rows = slice(start, min(start + CHUNK, count))
        said = tokens[1:][None, rows]
        logits = target.logits(features[None, rows])
        parts.append(ops.token_logprobs(logits, None, None, None, None, said)[0])
    return torch.cat(parts)
