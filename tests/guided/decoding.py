"""Decoding under a grammar by the real round, with the masks applied where the rule accepts."""

from __future__ import annotations

from dataclasses import replace

import torch

from aquiline.core.params import SamplingParams
from aquiline.decoding.models import DecoderModels
from aquiline.decoding.prefill import prefill
from aquiline.decoding.round import decode_round
from aquiline.decoding.state import DecodeState
from aquiline.guided.batch import GuidedBatch
from aquiline.guided.grammar import Grammar
from aquiline.guided.matcher import Matcher
from aquiline.sampling.batch import SamplingBatch
from aquiline.speculation.tree import TreeShape
from aquiline.speculation.verification.rules import RULES

PAGE = 16


def unpacked(masks: torch.Tensor, vocab: int) -> torch.Tensor:
    """[..., words] int32 -> [..., vocab] bool."""
    bits = masks[..., None] >> torch.arange(32, dtype=torch.int32) & 1
    return bits.flatten(-2)[..., :vocab].bool()


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

    class Guided(RULES["coupled"]):  # type: ignore[misc, name-defined]
        """Accepts what the grammars allow."""

        def accept(self, tokens, logits):
            allowed = unpacked(batch.masks(tree, tokens), vocab)
            return super().accept(tokens, logits.masked_fill(~allowed, -torch.inf))

    pages = -(-(width + max_tokens + 2 * tree.size) // PAGE)
    planes = models.planes(1 + len(prompts) * pages, PAGE)
    page_table = 1 + torch.arange(len(prompts) * pages).view(len(prompts), pages)
    padded = torch.tensor([[*p[:-1], *[0] * (width + 1 - len(p))] for p in prompts])
    counts = torch.tensor([len(prompt) - 1 for prompt in prompts])
    cpu = torch.device("cpu")
    sampling = SamplingBatch.of([params] * len(prompts), range(len(prompts)), cpu)
    state = prefill(models, planes, page_table, padded, counts, sampling).state
    roots = torch.tensor([prompt[-1] for prompt in prompts])
    first = replace(state, roots=roots, pending_tokens=roots[:, None])
    state = DecodeState.empty(len(prompts), tree.depth + 1, models.feature_size, models.dtype, cpu)
    state.store(torch.arange(len(prompts)), first)
    texts: list[list[int]] = [[] for _ in prompts]
    rounds, tables = 0, tree.tables(cpu)
    while not all(map(_ended, matchers, texts, [max_tokens] * len(texts))):
        result = decode_round(models, planes, tables, Guided, page_table, state, sampling)
        taken = (result.verdict.accepted + 1).tolist()
        emitted = [row[:n] for row, n in zip(result.verdict.tokens.tolist(), taken, strict=True)]
        for matcher, text, tokens in zip(matchers, texts, emitted, strict=True):
            if not _ended(matcher, text, max_tokens):
                text += tokens
        batch.advance(emitted)
        state, rounds = result.state, rounds + 1
    return [
        _cut(text, grammar, max_tokens) for text, grammar in zip(texts, grammars, strict=True)
    ], rounds


def _ended(matcher: Matcher | None, text: list[int], max_tokens: int) -> bool:
    return len(text) >= max_tokens or (matcher is not None and matcher.finished)


def _cut(text: list[int], grammar: Grammar | None, max_tokens: int) -> list[int]:
    ends = () if grammar is None else grammar.end_tokens
    end = next((i + 1 for i, token in enumerate(text) if token in ends), max_tokens)
    return text[: min(end, max_tokens)]
