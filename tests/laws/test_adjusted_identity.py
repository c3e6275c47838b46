"""Laws 1 and 3 for what changes logits: the text is the one-token-at-a-time oracle's.

Through the real prefill and round, in float64: what a round counts for the next one, positions, and
paths of nodes that were accepted or not. Every request of a batch has parameters of its own.
"""

from __future__ import annotations

import pytest
import torch

from aquiline.core.params import SamplingParams
from aquiline.decoding.loop import decode_prompts
from aquiline.speculation.tree import TreeShape
from tests.laws.tiny import (
    decode,
    memoryless_models,
    oracle_text,
    prophetic_models,
    tiny_eagle3_models,
    tiny_models,
)

COUNT, ENDS = 24, (4, 17)
BIAS = {3: 1.5, 9: -100.0, 21: 2.0, 49: 0.75}
ALLOWED = tuple(range(1, 50, 2))
SETTINGS = {
    "none": {},
    "repetition": {"repetition_penalty": 1.5},
    "presence": {"presence_penalty": 1.9},
    "frequency": {"frequency_penalty": 1.2},
    "bias": {"logit_bias": BIAS},
    "allowed": {"allowed_token_ids": ALLOWED},
    "banned": {"banned_token_ids": (1, 2, 5, 8, 13, 21, 34)},
    "min_tokens": {"min_tokens": 11, "logit_bias": dict.fromkeys(ENDS, 4.0)},
    "all": {
        "repetition_penalty": 0.9, "presence_penalty": 0.7, "frequency_penalty": 0.4,
        "logit_bias": BIAS, "allowed_token_ids": ALLOWED, "banned_token_ids": (7, 11),
        "min_tokens": 5, "logprobs": 2, "top_p": 0.95, "min_p": 0.01,
    },
}  # fmt: skip
TREES = {"root": TreeShape.chain(0), "chain-3": TreeShape.chain(3),
         "eagle-25": TreeShape.named("eagle-25")}  # fmt: skip
PROMPTS = [[(7 * row + 3 * k) % 50 for k in range(3 + row % 5)] for row in range(len(SETTINGS))]
SEEDS = [100 + row for row in range(len(SETTINGS))]


def params_at(temperature):
    return [SamplingParams(temperature=temperature, max_tokens=COUNT, **fields)
            for fields in SETTINGS.values()]  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    """Of the oracle, by temperature; the models are the same throughout."""
    target = tiny_models().target
    return {
        temperature: [
            oracle_text(target, prompt, COUNT, params, seed, ENDS)
            for prompt, params, seed in zip(PROMPTS, params_at(temperature), SEEDS, strict=True)
        ]
        for temperature in (0.0, 0.9)
    }


def test_each_setting_changes_the_text(texts):
    target = tiny_models().target
    for temperature, said in texts.items():
        plain = [
            oracle_text(target, prompt, COUNT, SamplingParams(temperature=temperature), seed)
            for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
        ]
        same = [name for name, a, b in zip(SETTINGS, said, plain, strict=True) if a == b]
        assert same == ["none"]
        early = said[list(SETTINGS).index("min_tokens")]
        assert not set(early[:11]) & set(ENDS)
        assert set(early) & set(ENDS)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("draft", ["random", "reduced", "prophet"])
def test_the_text_is_the_oracles(texts, draft, temperature, tree):
    reduced = torch.arange(0, 50, 3) if draft == "reduced" else None
    models = tiny_models(token_ids=reduced)
    if draft == "prophet":
        foreseen = [[*p, *t] for p, t in zip(PROMPTS, texts[temperature], strict=True)]
        models = prophetic_models(models, foreseen)
    decoded = decode(
        models, PROMPTS, COUNT, TREES[tree], params_at(temperature), SEEDS, end_tokens=ENDS
    )
    assert decoded.texts == texts[temperature]
    depth = TREES[tree].depth
    if draft == "prophet" and depth:
        assert all(sum(rounds) / len(rounds) > 0.8 * depth for rounds in decoded.accepted)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("tree", ["chain-3", "eagle-25"])
def test_a_draft_that_is_the_target_is_always_accepted(tree, temperature):
    """So the draft's logits are adjusted at every node as the target's are."""
    decoded = decode(
        memoryless_models(), PROMPTS, COUNT, TREES[tree], params_at(temperature), SEEDS,
        end_tokens=ENDS,
    )  # fmt: skip
    assert {*(depth for rounds in decoded.accepted for depth in rounds)} == {TREES[tree].depth}


def test_multi_round_says_the_same_when_greedy(texts):
    decoded = decode(
        tiny_models(), PROMPTS, COUNT, TREES["eagle-25"], params_at(0.0), SEEDS, "multi-round",
        end_tokens=ENDS,
    )  # fmt: skip
    assert decoded.texts == texts[0.0]


def test_an_eagle3_draft_changes_nothing():
    models = tiny_eagle3_models(draft_vocab=20)
    params = params_at(0.9)
    plain = [
        oracle_text(models.target, prompt, COUNT, one, seed, ENDS)
        for prompt, one, seed in zip(PROMPTS, params, SEEDS, strict=True)
    ]
    decoded = decode(models, PROMPTS, COUNT, TREES["eagle-25"], params, SEEDS, end_tokens=ENDS)
    assert decoded.texts == plain


def test_a_fixed_batch_of_prompts_is_adjusted_too():
    models, params = tiny_models(), params_at(0.9)[-1]
    texts = [[] for _ in PROMPTS]
    rounds = decode_prompts(models, PROMPTS, TREES["chain-3"], COUNT, frozenset(ENDS), params)
    for step in rounds:
        verdict = zip(step.rows, step.verdict.tokens.tolist(), step.verdict.accepted.tolist(),
                      strict=True)  # fmt: skip
        for row, tokens, accepted in verdict:
            texts[row] += tokens[: accepted + 1]
    for row, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        expected = oracle_text(models.target, prompt, len(text) + 1, params, row, ENDS)
        assert len(text) >= 5
        assert text == expected[1:]
