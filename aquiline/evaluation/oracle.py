"""The oracle of losslessness: the exact law of a next token, written down token by token in fp64.

It shares no code with ``sampling`` and ``kernels``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aquiline.core.params import SamplingParams


def target_distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """logits [..., V] -> the distribution that ``params`` ask for, fp64, token by token."""
    rows = [_one_distribution(row, params) for row in logits.double().reshape(-1, logits.shape[-1])]
    return torch.stack(rows).reshape(logits.shape)


def _one_distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    values = logits.tolist()
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    if params.temperature == 0:
        return torch.zeros_like(logits).index_fill(0, torch.tensor(order[0]), 1.0)
    best = values[order[0]]
    weight = torch.exp((logits - best) / params.temperature).tolist()
    if params.top_k:
        last = values[order[min(params.top_k, len(order)) - 1]]
        order = [token for token in order if values[token] >= last]
    total = sum(weight[token] for token in order)
    kept: list[int] = []
    mass_above = mass = 0.0  # strictly above the group of equal tokens at hand; of all so far
    for token in order:
        if not kept or values[token] < values[kept[-1]]:
            mass_above = mass
        if params.top_p < 1 and kept and mass_above >= params.top_p:
            break
        kept.append(token)
        mass += weight[token] / total
    kept = [token for token in kept if weight[token] >= params.min_p]  # the largest weight is 1
    probs = torch.zeros_like(logits)
    probs[kept] = torch.tensor([weight[token] for token in kept], dtype=probs.dtype)
    return probs / probs.sum()


def adjusted_logits(
    logits: Tensor,
    params: SamplingParams,
    prompt: Collection[int],
    said: Sequence[int],
    end_tokens: Collection[int],
) -> Tensor:
    """Raw logits [V] after ``said`` -> those that penalties, bias and bans make of them, fp64."""
    bias, allowed = params.logit_bias or {}, params.allowed_token_ids
    banned = set(params.banned_token_ids)
    if len(said) < params.min_tokens:
        banned |= set(end_tokens)
    counts, adjusted = Counter(said), []
    for token, value in enumerate(logits.double().tolist()):
        if token in counts or token in prompt:
            factor = params.repetition_penalty
            value = value / factor if value > 0 else value * factor
        if token in counts:
            value -= params.presence_penalty + params.frequency_penalty * counts[token]
        value += bias.get(token, 0.0)
        silent = token in banned or (allowed is not None and token not in allowed)
        adjusted.append(float("-inf") if silent else value)
    return torch.tensor(adjusted, dtype=torch.float64)


@dataclass(frozen=True)
class TextLaw:
    """What follows a text, if the logits after a token are row [token] of ``target`` [V, V].

    Attributes:
        prompt: its last token is the one before the text.
        form: bool [V, V], row [token] the tokens that may follow; None: all may.
    """

    target: Tensor
    params: SamplingParams
    prompt: tuple[int, ...]
    end_tokens: tuple[int, ...] = ()
    form: Tensor | None = None
    _known: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def __call__(self, texts: Tensor) -> Tensor:
        """Texts [n, k] so far -> the distributions [n, V] of their next tokens."""
        return torch.stack([self._next(text) for text in texts.tolist()])

    def _next(self, said: list[int]) -> Tensor:
        last = said[-1] if said else self.prompt[-1]
        key = last, tuple(sorted(said)), len(said)
        if key not in self._known:
            logits = adjusted_logits(
                self.target[last], self.params, self.prompt, said, self.end_tokens
            )
            if self.form is not None:
                logits = logits.masked_fill(~self.form[last], float("-inf"))
            self._known[key] = target_distribution(logits, self.params)
        return self._known[key]
