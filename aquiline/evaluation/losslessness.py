"""Losslessness, measured: does a verification rule emit exactly the target's distribution?

An oracle of the target distribution that shares no code with ``sampling``, Pearson's chi-square
test, and a driver that runs many requests through the real functions (grow, rule, noise) with
tables in place of models: the next token's logits are a function of the token before, so the joint
law of the first tokens is a product of table rows and is known exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.core.params import SamplingParams
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.drafting import DraftedLevel, grow
from aquiline.speculation.tree import TreeShape, TreeTables
from aquiline.speculation.verification.noise import RoundNoise
from aquiline.speculation.verification.rules import Rule

RuleFactory = Callable[[RoundNoise], Rule]
ROOT = 0  # the token every request starts from
MIN_EXPECTED = 5.0
CHUNK = 20_000


# ------------------------------------------------------------------------------------- the oracle


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


# --------------------------------------------------------------------------------- the statistics


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """p-value of observed counts [n] under expected counts [n] of the same total.

    Cells that expect fewer than 5 are pooled; one that expects 0 and was seen gives p = 0.
    """
    counts, expected = counts.double(), expected.double()
    if bool((counts[expected == 0] > 0).any()):
        return 0.0
    order = expected.argsort(descending=True)
    counts, expected = counts[order], expected[order]
    large = int((expected >= MIN_EXPECTED).sum())
    if large < len(expected):
        if large and float(expected[large:].sum()) < MIN_EXPECTED:
            large -= 1  # the pool alone is too small: it takes the smallest large cell in
        counts = torch.cat((counts[:large], counts[large:].sum()[None]))
        expected = torch.cat((expected[:large], expected[large:].sum()[None]))
    freedom = len(expected) - 1
    if freedom < 1:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))


@dataclass(frozen=True)
class Cells:
    """Observed and expected counts [n] of the cells of a joint law."""

    counts: Tensor
    expected: Tensor

    @property
    def p_value(self) -> float:
        return chi_square(self.counts, self.expected)


def joint_cells(tokens: Tensor, transition: Tensor) -> Cells:
    """The joint law of tokens [B, L] of a Markov chain [V, V] that starts at ``ROOT``.

    A cell is a sequence that expects at least 5; what is left of a prefix when such sequences are
    taken out is one cell too, so no mass is lost and the number of cells stays below B / 5 each.
    """
    rows, vocab = tokens.shape[0], transition.shape[0]
    prob, last = torch.ones(1, dtype=torch.float64), torch.tensor([ROOT])  # of open cells
    at = torch.zeros(rows, dtype=torch.int64)  # open cell of each row still in one
    counts: list[Tensor] = []
    expected: list[Tensor] = []
    for column in tokens.unbind(1):
        column = column[: len(at)] if len(at) == rows else column
        children = prob[:, None] * transition[last]  # [open, V]
        split = children * rows >= MIN_EXPECTED
        index = split.flatten().cumsum(0).view_as(children) - 1
        stays = split[at, column]
        rest = torch.where(split, 0.0, children).sum(dim=-1)
        counts.append(torch.bincount(at[~stays], minlength=len(prob)))
        expected.append(torch.where(split.all(dim=-1), 0.0, rest) * rows)
        at = index[at, column][stays]
        tokens = tokens[stays]
        prob, last = children[split], split.nonzero()[:, 1]
        _ = vocab
    counts.append(torch.bincount(at, minlength=len(prob)))
    expected.append(prob * rows)
    return Cells(torch.cat(counts), torch.cat(expected))
