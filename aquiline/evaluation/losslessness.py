"""Losslessness, measured: does a verification rule emit exactly the target's distribution?

Pearson's chi-square test, and a driver that runs many requests through the real functions (grow,
adjustments, rule, noise) with tables in place of models: the next token's logits are a function of
the token before, so the joint law of the first tokens is known exactly (oracle.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aquiline.core.params import SamplingParams
from aquiline.evaluation.oracle import TextLaw
from aquiline.sampling.adjust import Adjustments, bit_words
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.adjusting import adjust_draft, adjust_target, settle
from aquiline.speculation.drafting import DraftedLevel, grow
from aquiline.speculation.tree import TreeShape, TreeTables
from aquiline.speculation.verification.noise import RoundNoise
from aquiline.speculation.verification.rules import Rule

RuleFactory = Callable[[RoundNoise], Rule]
ROOT = 0  # the token every request starts from
MIN_EXPECTED = 5.0
CHUNK = 20_000
VOCAB_ROOM = 64  # the vocabularies here are no larger
ROOT_ALONE = TreeShape.chain(0).tables(torch.device("cpu"))


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


def joint_cells(tokens: Tensor, law: Callable[[Tensor], Tensor]) -> Cells:
    """The joint law of tokens [B, L]; ``law`` of the next one is a function of those before, [n, k]
    -> [n, V].

    A cell is a sequence that expects at least 5; what is left of a prefix when such sequences are
    taken out is one cell too, so no mass is lost and there are few cells however long the sequence.
    """
    rows = tokens.shape[0]
    prob = torch.ones(1, dtype=torch.float64)  # of the open prefixes
    said = torch.zeros(1, 0, dtype=torch.int64)
    at = torch.zeros(rows, dtype=torch.int64)  # the open prefix of each row that is still in one
    counts: list[Tensor] = []
    expected: list[Tensor] = []
    for position in range(tokens.shape[1]):
        column = tokens[:, position]
        longer = prob[:, None] * law(said)  # [open, V]
        stays_open = longer * rows >= MIN_EXPECTED
        stays = stays_open[at, column]
        counts.append(torch.bincount(at[~stays], minlength=len(prob)))
        expected.append(torch.where(stays_open, 0.0, longer).sum(dim=-1) * rows)
        index = stays_open.flatten().cumsum(0).view_as(longer) - 1
        at, tokens = index[at, column][stays], tokens[stays]
        prefix, token = stays_open.nonzero(as_tuple=True)
        prob, said = longer[stays_open], torch.cat((said[prefix], token[:, None]), dim=1)
    counts.append(torch.bincount(at, minlength=len(prob)))
    expected.append(prob * rows)
    return Cells(torch.cat(counts), torch.cat(expected))


# ------------------------------------------------------------------------------------- the driver


@dataclass(frozen=True)
class MarkovPair:
    """A target and a draft as tables: row t holds the logits of the token after t.

    Attributes:
        target: [V, V].
        draft: [V, Vd].
        draft_ids: [Vd] target ids of a reduced draft vocabulary, or None.
        retrieved: [V, R] what a tree's retrieved chain says after each root, or None.
        form: bool [V, V], row t the tokens that a form allows after t; None: it allows all.
    """

    target: Tensor
    draft: Tensor
    draft_ids: Tensor | None = None
    retrieved: Tensor | None = None
    form: Tensor | None = None

    @classmethod
    def random(
        cls,
        vocab: int,
        seed: int,
        sharpness: float = 1.5,
        disagreement: float = 1.0,
        draft_ids: Tensor | None = None,
    ) -> MarkovPair:
        """Gaussian target logits; the draft's are the same plus Gaussian ``disagreement``."""
        generator = torch.Generator().manual_seed(seed)
        target = sharpness * torch.randn(vocab, vocab, generator=generator)
        draft = target + disagreement * torch.randn(vocab, vocab, generator=generator)
        return cls(target, draft if draft_ids is None else draft[:, draft_ids], draft_ids)

    def to_target(self, ids: Tensor) -> Tensor:
        """Draft vocabulary ids -> target token ids."""
        return ids if self.draft_ids is None else self.draft_ids[ids]

    def foreseen(self, roots: Tensor, depth: int) -> Tensor | None:
        """[B, depth] tokens that alone may follow, one after another, then -1."""
        if self.form is None:
            return None
        alone, last = self.form.sum(dim=-1) == 1, roots
        known, found = torch.ones_like(roots, dtype=torch.bool), []
        for _ in range(depth):
            known = known & alone[last]
            last = self.form[last].int().argmax(dim=-1)
            found.append(torch.where(known, last, -1))
        return torch.stack(found, dim=1)

    def masks(self, tree: TreeTables, tokens: Tensor) -> Tensor | None:
        """The form's masks of every node [B, N, words]; empty where the form excludes the node."""
        if self.form is None:
            return None
        allowed = self.form[tokens]
        for node in range(1, tree.shape.size):
            above = allowed[:, tree.shape.parents[node]]
            allowed[:, node] &= above.gather(1, tokens[:, node, None])
        return bit_words(allowed)


@dataclass(frozen=True)
class Fit:
    """How well a sample fits the target.

    Attributes:
        first_token, joint: p-values.
        rounds: rounds that were run.
        tokens_per_round: what they emitted on average.
    """

    first_token: float
    joint: float
    rounds: int
    tokens_per_round: float


def measure_fit(
    pair: MarkovPair,
    shape: TreeShape,
    rule: RuleFactory,
    params: SamplingParams,
    rows: int,
    seed: int = 0,
    prompt: tuple[int, ...] = (ROOT,),
    end_tokens: tuple[int, ...] = (),
) -> Fit:
    """Chi-square of the first token, and of the first depth + 1 together, over ``rows`` requests.

    The prompt ends with ``ROOT``. Nothing ends a text: what ``end_tokens`` does is up to
    ``min_tokens``.

    Every request has its own seed and position. One whose first round emits fewer than depth + 1
    tokens goes on with further rounds, so what a round leaves to the next is tested too.
    """
    generator = torch.Generator().manual_seed(seed)
    tree = shape.tables(torch.device("cpu"))
    law = TextLaw(pair.target, params, prompt, end_tokens, pair.form)
    samples, accepted = [], []
    for start in range(0, rows, CHUNK):
        count = min(CHUNK, rows - start)
        seeds = torch.randint(2**63 - 1, (count,), generator=generator)
        positions = torch.randint(1, 2**20, (count,), generator=generator)
        adjustments = _adjustments(pair, params, prompt, end_tokens, positions)
        sampling = _sampling(params, seeds, adjustments)
        texts = _texts(pair, tree, rule, sampling, positions)
        samples.append(texts.tokens)
        accepted.append(texts.accepted)
    tokens, per_round = torch.cat(samples), torch.cat(accepted) + 1
    return Fit(
        joint_cells(tokens[:, :1], law).p_value,
        joint_cells(tokens, law).p_value,
        len(per_round),
        float(per_round.double().mean()),
    )


@dataclass(frozen=True)
class _Texts:
    """tokens [B, D + 1]: the first of each request; accepted [R]: in each round of any request."""

    tokens: Tensor
    accepted: Tensor


def _sampling(params: SamplingParams, seeds: Tensor, adjustments: Adjustments) -> SamplingBatch:
    """One row per seed, all with the same parameters."""
    one = SamplingBatch.of([params], [0], seeds.device, adjustments=adjustments, slots=[0])
    count = len(seeds)
    return SamplingBatch(
        one.temperature.expand(count), one.top_k.expand(count), one.top_p.expand(count),
        one.min_p.expand(count), seeds, torch.zeros_like(seeds), torch.arange(count),
        one.all_greedy, one.filtered, one.adjustments, one.logprobs,
    )  # fmt: skip


def _adjustments(
    pair: MarkovPair,
    params: SamplingParams,
    prompt: tuple[int, ...],
    end_tokens: tuple[int, ...],
    positions: Tensor,
) -> Adjustments:
    """One row per request, whose first token is at ``positions`` [B]."""
    vocab = len(pair.target)
    one = Adjustments.empty(1, vocab, positions.device, biased=VOCAB_ROOM, ends=VOCAB_ROOM)
    one.set(0, params, prompt, (), end_tokens)
    rows = one.select(torch.zeros_like(positions))
    rows.min_length.copy_(positions + params.min_tokens)
    return rows


def _texts(
    pair: MarkovPair,
    tree: TreeTables,
    rule: RuleFactory,
    sampling: SamplingBatch,
    positions: Tensor,
) -> _Texts:
    """Rounds until every request has depth + 1 tokens."""
    width = tree.shape.depth + 1
    texts = torch.zeros(len(positions), 2 * width, dtype=torch.int64)
    done = torch.zeros(len(positions), dtype=torch.int64)
    roots = torch.full_like(positions, ROOT)
    left = torch.arange(len(positions))
    history = []
    while len(left):
        part = sampling.select(left)
        after = positions[left, None] + done[left, None] + torch.arange(width)
        round_ = RoundNoise(tree, part, after, pair.target.shape[0], pair.draft_ids)
        emitted, accepted = _one_round(pair, round_, rule(round_), roots[left])
        columns = done[left, None] + torch.arange(width)
        texts[left[:, None], columns] = emitted  # what is past ``accepted`` is overwritten later
        history.append(accepted)
        done[left] += accepted + 1
        roots[left] = emitted.gather(1, accepted[:, None]).squeeze(1)
        left = left[done[left] < width]
    return _Texts(texts[:, :width], torch.cat(history))


def _one_round(
    pair: MarkovPair, round_: RoundNoise, rule: Rule, roots: Tensor
) -> tuple[Tensor, Tensor]:
    """Draft, verify, accept: the emitted tokens [B, D + 1] and how many were drafted [B]."""

    def propose(above: DraftedLevel | None, count: int) -> Tensor:
        parents = roots[:, None] if above is None else above.expanded_tokens
        logits = pair.draft[parents]
        adjust_draft(round_, logits, above, forms_of_roots)
        return rule.propose(logits, 1 if above is None else above.depth + 1, count)

    forms_of_roots = pair.masks(ROOT_ALONE, roots[:, None])
    foreseen = pair.foreseen(roots, round_.tree.shape.depth) if rule.any_proposal else None
    tokens = grow(round_.tree, roots, propose, pair.to_target, foreseen)
    if pair.retrieved is not None:
        tokens = torch.cat((tokens, pair.retrieved[roots]), dim=1)
    logits = pair.target[tokens]
    raw = adjust_target(round_, logits, tokens, pair.masks(round_.tree, tokens))
    verdict = rule.accept(tokens, logits)
    settle(round_, logits, raw, verdict)
    return verdict.tokens, verdict.accepted
