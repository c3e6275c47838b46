"""Decoding under grammars by the real round, without an engine."""

from __future__ import annotations

from dataclasses import replace

import torch

from aquiline.core.params import SamplingParams
from aquiline.decoding.guided import GuidedRound
from aquiline.decoding.models import DecoderModels
from aquiline.decoding.prefill import prefill
from aquiline.decoding.rows import DeviceRows, Forms, StagedRound
from aquiline.decoding.state import DecodeState
from aquiline.guided.batch import GuidedBatch
from aquiline.guided.grammar import Grammar
from aquiline.guided.matcher import Matcher
from aquiline.sampling.adjust import Adjustments
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.tree import TreeShape
from aquiline.speculation.verification.rules import RULES

PAGE = 16
ANY = {"json_object": True}  # says no more than that there is a form: the grammars are given


def guided_texts(
    models: DecoderModels,
    prompts: list[list[int]],
    grammars: list[Grammar | None],
    tree: TreeShape,
    params: SamplingParams,
    max_tokens: int,
) -> tuple[list[list[int]], int]:
    """What is said after each prompt, the end token included, row i seeded with i; rounds taken.

    Rows without a grammar say ``max_tokens``. The prompts' last tokens are the first roots: the
    token that a prefill draws is thrown away, as it knows no mask.
    """
    vocab, width = models.target.config.vocab_size, max(map(len, prompts)) - 1
    matchers = [None if grammar is None else Matcher(grammar) for grammar in grammars]
    batch = GuidedBatch(matchers, vocab)
    pages = -(-(width + max_tokens + 2 * tree.size) // PAGE)
    planes = models.planes(1 + len(prompts) * pages, PAGE)
    page_table = 1 + torch.arange(len(prompts) * pages).view(len(prompts), pages)
    padded = torch.tensor([[*p[:-1], *[0] * (width + 1 - len(p))] for p in prompts])
    counts = torch.tensor([len(prompt) - 1 for prompt in prompts])
    cpu = torch.device("cpu")
    every = range(len(prompts))
    asked = [params if g is None else replace(params, structured_outputs=ANY) for g in grammars]
    adjustments = Adjustments.empty(len(prompts), vocab, cpu)
    for row in every:
        adjustments.set(row, asked[row], prompts[row], (), ())
    sampling = SamplingBatch.of(asked, every, cpu, adjustments=adjustments, slots=every)
    state = prefill(models, planes, page_table, padded, counts, sampling).state
    roots = torch.tensor([prompt[-1] for prompt in prompts])
    first = replace(state, roots=roots, pending_tokens=roots[:, None])
    state = DecodeState.empty(len(prompts), tree.depth + 1, models.feature_size, models.dtype, cpu)
    state.store(torch.arange(len(prompts)), first)
    texts: list[list[int]] = [[] for _ in prompts]
    rows = DeviceRows(state, sampling, page_table, torch.ones(len(prompts), dtype=torch.bool))
    forms = Forms.empty(len(prompts), tree, vocab, cpu)
    rule = RULES["coupled"]
    round_ = GuidedRound(StagedRound(models, planes, tree.tables(cpu), rule, rows, forms))
    rounds = 0
    while not all(map(_ended, matchers, texts, [max_tokens] * len(texts))):
        emitted = [row[: accepted + 1] for accepted, *row in round_.run(batch).tokens.tolist()]
        for matcher, text, tokens in zip(matchers, texts, emitted, strict=True):
            if not _ended(matcher, text, max_tokens):
                text += tokens
            if matcher is not None:
                matcher.advance(tokens)
        for row, (matcher, text) in enumerate(zip(matchers, texts, strict=True)):
            if _ended(matcher, text, max_tokens):
                rows.active[row] = False
                page_table[row] = 0
        rounds += 1
    return [
        _cut(text, grammar, max_tokens) for text, grammar in zip(texts, grammars, strict=True)
    ], rounds


def _ended(matcher: Matcher | None, text: list[int], max_tokens: int) -> bool:
    return len(text) >= max_tokens or (matcher is not None and matcher.finished)


def _cut(text: list[int], grammar: Grammar | None, max_tokens: int) -> list[int]:
    ends = () if grammar is None else grammar.end_tokens
    end = next((i + 1 for i, token in enumerate(text) if token in ends), max_tokens)
    return text[: min(end, max_tokens)]
