"""Paired ranks and walks give the real decoder's rounds, exactly."""

from __future__ import annotations

import pytest
import torch

from aquiline.core.errors import AquilineError
from aquiline.core.params import SamplingParams
from aquiline.decoding.loop import decode_prompts
from aquiline.decoding.models import DecoderModels, Drafter
from aquiline.engine.llm import LLM
from aquiline.evaluation import paired
from aquiline.evaluation.paired import token_ranks
from aquiline.evaluation.texts import FixedText
from aquiline.evaluation.walk import (
    PairedAcceptance,
    accepted_depths,
    paired_acceptance,
    rounds_of,
)
from aquiline.models.draft_checkpoint import load_draft
from aquiline.models.registry import shipped_draft
from aquiline.speculation.tree import TreeShape
from tests.laws.tiny import decode, memoryless_models, tiny_eagle3_models, tiny_models

PROMPTS = [[1, 2, 3], [7], [9, 4, 30, 2, 2, 11]]
SEEDS = [5, 0, 2**40]
COUNT, DEPTH = 40, 5
TREES = [TreeShape.chain(3), TreeShape.chain(1), TreeShape.named("eagle-25")]
WIRINGS = {
    "eagle": tiny_models,
    "reduced": lambda: tiny_models(token_ids=torch.arange(0, 50, 2)),
    "eagle3": tiny_eagle3_models,
    "eagle3-reduced": lambda: tiny_eagle3_models(draft_vocab=30, draft_layers=2),
    "perfect": memoryless_models,
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny_texts(models: DecoderModels, params: SamplingParams, seeds=SEEDS) -> list[FixedText]:
    plain = DecoderModels(models.target, None)
    rows = len(PROMPTS)
    said = decode(plain, PROMPTS, COUNT + DEPTH, TreeShape.chain(0), [params] * rows, seeds).texts
    return [
        FixedText(tuple(prompt), tuple(text), COUNT, seed)
        for prompt, text, seed in zip(PROMPTS, said, seeds, strict=True)
    ]


def of_rounds(accepted: list[int], depth: int) -> PairedAcceptance:
    by_depth = tuple(sum(a >= d for a in accepted) for d in range(1, depth + 1))
    return PairedAcceptance(len(accepted), by_depth)


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_rounds_are_the_decoders(wiring, temperature):
    models, params = WIRINGS[wiring](), SamplingParams(temperature=temperature)
    texts = tiny_texts(models, params)
    ranks = token_ranks(models, texts, temperature, DEPTH)
    accepted_something = False
    for shape in TREES:
        real = decode(models, PROMPTS, COUNT, shape, [params] * len(PROMPTS), SEEDS).accepted
        for one, accepted in zip(ranks, real, strict=True):
            depths = accepted_depths(one, shape).tolist()
            assert [depths[root] for root in rounds_of(depths)] == accepted
        flat = [depth for accepted in real for depth in accepted]
        assert paired_acceptance(ranks, shape) == of_rounds(flat, shape.depth)
        accepted_something |= sum(flat) > 0
    assert accepted_something


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("wiring", ["eagle", "eagle3-reduced"])
def test_ranks_are_the_paths_of_a_wide_tree(wiring, temperature):
    """A tree so wide that drafts which know nothing are accepted two deep."""
    models, params = WIRINGS[wiring](), SamplingParams(temperature=temperature)
    texts, wide = tiny_texts(models, params, range(len(PROMPTS))), range(18)
    ranks = token_ranks(models, texts, temperature, 2, width=len(wide))
    shape = TreeShape.of([[i] for i in wide] + [[i, j] for i in wide for j in wide])
    nodes, roots, checked = [(), *shape.paths], [0] * len(PROMPTS), 0
    for one in decode_prompts(models, PROMPTS, shape, COUNT, frozenset(), params):
        for row, path in zip(one.rows, one.verdict.path.tolist(), strict=True):
            accepted = nodes[path[-1]]
            assert tuple(ranks[row][roots[row], : len(accepted)].tolist()) == accepted
            roots[row] += len(accepted) + 1
            checked += len(accepted) == 2
    assert checked > 5


def test_a_perfect_draft_has_rank_zero_everywhere():
    models = memoryless_models()
    texts = tiny_texts(models, SamplingParams(temperature=0))
    ranks = token_ranks(models, texts, 0, 3)
    assert all(one.shape == (COUNT - 1, 3) and not one.any() for one in ranks)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_batches_and_chunks_change_nothing(temperature, monkeypatch):
    models = tiny_models()
    texts = tiny_texts(models, SamplingParams(temperature=temperature))
    texts = [*texts, FixedText((3, 4), (5,), 1, 0)]  # nothing to draft
    whole = token_ranks(models, texts, temperature, 4)
    monkeypatch.setattr(paired, "_CPU_BATCH_TOKENS", 50)
    monkeypatch.setattr(paired, "_CPU_LOGITS", 350)
    for one, other in zip(whole, token_ranks(models, texts, temperature, 4), strict=True):
        assert torch.equal(one, other)
    assert whole[-1].shape == (0, 4)


def test_what_lies_past_the_known_tokens_is_rejected():
    models = memoryless_models()
    texts = tiny_texts(models, SamplingParams(temperature=0))
    cut = [FixedText(t.prompt, t.tokens[:COUNT], COUNT, t.seed) for t in texts]
    for one in token_ranks(models, cut, 0, 3, width=2):
        assert not one[:-2].any()
        assert one[-2:].tolist() == [[0, 0, 2], [0, 2, 2]]


def test_the_noise_counts():
    """With another seed than the text's, or another temperature, the ranks are others."""
    models = tiny_models()
    texts = tiny_texts(models, SamplingParams(temperature=0.8))
    right = token_ranks(models, texts, 0.8, 2)
    reseeded = [FixedText(t.prompt, t.tokens, t.length, t.seed + 1) for t in texts]
    for other in (token_ranks(models, reseeded, 0.8, 2), token_ranks(models, texts, 0, 2)):
        assert not torch.equal(torch.cat(right), torch.cat(other))


def test_a_walk_over_hand_made_ranks():
    shape = TreeShape.of([[0], [1], [0, 0], [1, 0], [0, 0, 0]])
    ranks = torch.tensor(
        [[0, 0, 1], [1, 0, 0], [0, 1, 0], [2, 0, 0], [1, 1, 0], [0, 0, 0], [8, 8, 8]]
    )
    assert accepted_depths(ranks, shape).tolist() == [2, 2, 1, 0, 1, 3, 0]
    assert rounds_of([2, 2, 1, 0, 1, 3, 0]) == [0, 3, 4, 6]
    assert paired_acceptance([ranks], shape) == PairedAcceptance(4, (2, 1, 0))
    counted = torch.tensor([True, True, True, False, True, True, False, True])
    assert paired_acceptance([ranks], shape, [counted]) == PairedAcceptance(2, (2, 1, 0))
    assert paired_acceptance([ranks], TreeShape.chain(0)) == PairedAcceptance(7, ())


def test_what_cannot_be_ranked_is_refused():
    models = tiny_models()
    with pytest.raises(AquilineError, match="no draft"):
        token_ranks(DecoderModels(models.target, None), [], 0, 3)
    with pytest.raises(AquilineError, match="depth=0"):
        token_ranks(models, [], 0, 0)
    with pytest.raises(AquilineError, match="rank deeper"):
        accepted_depths(torch.zeros(4, 2, dtype=torch.int64), TreeShape.chain(3))


@pytest.fixture(scope="module")
def smollm2() -> LLM:
    return LLM("smollm2-135m-instruct", "float32", device="cpu", max_model_len=256)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_smollm2_with_the_shipped_draft(smollm2, temperature):
    """fp32: the counts by depth are the decoder's."""
    count, asked = 16, ["Name three rivers.", "Write a haiku about rain."]
    prompts = [smollm2.tokenizer.encode_chat([{"role": "user", "content": a}]) for a in asked]
    params = [
        SamplingParams(temperature=temperature, max_tokens=count + 4, seed=seed, ignore_eos=True)
        for seed in range(len(asked))  # as decode_prompts seeds them
    ]
    said = smollm2.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    texts = [
        FixedText(tuple(prompt), out.outputs[0].token_ids, count, seed)
        for seed, (prompt, out) in enumerate(zip(prompts, said, strict=True))
    ]
    target = smollm2.engine.runner.models.target
    folder = shipped_draft("smollm2-135m-instruct")
    assert folder is not None
    draft = load_draft(folder, target, 256)
    models = DecoderModels(target, Drafter(draft.draft, draft.head))
    ranks = token_ranks(models, texts, temperature, 4)
    for shape in (TreeShape.chain(3), TreeShape.of([[0], [1], [2], [0, 0], [0, 1], [1, 0]])):
        rounds = decode_prompts(
            models, prompts, shape, count, frozenset(), SamplingParams(temperature=temperature)
        )
        accepted = [depth for one in rounds for depth in one.verdict.accepted.tolist()]
        found = paired_acceptance(ranks, shape)
        assert found == of_rounds(accepted, shape.depth)
        assert found.tokens_per_call > 1.2
