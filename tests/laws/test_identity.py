"""Laws 1 and 3: the text is what plain decoding says, greedy or seeded, whatever the draft does.

Everything in float64 on tiny random models, so that equality is token for token without excuses.
A random draft exercises rejection, prophetic and memoryless ones acceptance; the drafts themselves
are compared with a draft that has no cache, for a broken draft would be slow, never wrong.
"""

from __future__ import annotations

import math

import pytest
import torch

from aquiline.attention.packed import PackedAttention
from aquiline.core.params import SamplingParams
from aquiline.decoding import round as round_module
from aquiline.decoding.models import DecoderModels
from aquiline.kernels import cpu, ops, reference
from aquiline.sampling.batch import SamplingBatch
from aquiline.sampling.draw import draw_top, position_noise
from aquiline.speculation.tree import TreeShape
from tests.laws.tiny import (
    VOCAB,
    Decoded,
    agreeable_rule,
    decode,
    features_of,
    memoryless_models,
    oracle_text,
    prophetic_models,
    tiny_models,
)

GREEDY = SamplingParams(temperature=0)
FILTERED = SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.01)
TREES = {
    "root": TreeShape.chain(0),
    "chain-1": TreeShape.chain(1),
    "chain-3": TreeShape.chain(3),
    "bushy": TreeShape.of([[0], [1], [2], [0, 0], [0, 1], [1, 0]]),
    "lopsided": TreeShape.of([[0], [1], [1, 0], [1, 1], [1, 1, 0]]),
    "eagle-25": TreeShape.named("eagle-25"),
    "chain-2, retrieving": TreeShape.chain(2).retrieving(4),
    "bushy, retrieving": TreeShape.of([[0], [1], [0, 0], [0, 1], [1, 0]]).retrieving(2),
}
REDUCED = torch.arange(1, VOCAB, 3)
COUNT = 10


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", "reference"])
def _attention(request, monkeypatch):
    """Both implementations; the fixture sees to it that the one meant is the one that ran."""
    module, name = (cpu, "run_attention") if request.param == "cpu" else (cpu, "tree_attention")
    real = cpu.run_attention if request.param == "cpu" else reference.tree_attention
    if request.param == "reference":
        monkeypatch.setattr(ops, "plan_attention", lambda *_: None)
    calls = []

    def counted(*args):
        calls.append(None)
        return real(*args)

    monkeypatch.setattr(module, name, counted)
    yield
    assert calls


def _prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


def _edges(page_size):
    """Prompt lengths around the edge of a page."""
    return [page_size, 1, page_size + 1, page_size - 1]


_SAID: dict[object, list[int]] = {}  # what the oracle said, for the tests share their questions


def _oracle(models, prompts, params, seeds, count=COUNT):
    weights = float(models.target.lm_head.weight.sum())
    said = []
    for prompt, one, seed in zip(prompts, params, seeds, strict=True):
        key = (weights, tuple(prompt), one, seed, count)
        if key not in _SAID:
            _SAID[key] = oracle_text(models.target, prompt, count, one, seed)
        said.append(_SAID[key])
    return said


# ----------------------------------------------------------------------------------- the identity


@pytest.mark.usefixtures("_attention")
@pytest.mark.parametrize("reduced", [False, True], ids=["whole", "reduced"])
@pytest.mark.parametrize("page_size", [4, 8])
@pytest.mark.parametrize("tree", TREES)
def test_text_is_the_oracles(tree, page_size, reduced):
    """Batches of 1 to 4 rows; greedy, seeded and filtered ones side by side."""
    models = tiny_models(token_ids=REDUCED if reduced else None)
    prompts = _prompts(_edges(page_size))
    params = [GREEDY, SamplingParams(), FILTERED, SamplingParams(temperature=0.7, top_p=0.8)]
    seeds = [11, 12, 2**62 + 13, 14]
    expected = _oracle(models, prompts, params, seeds)
    for rows in (2, 4) if page_size == 4 else (1, 3):
        shift = rows + page_size  # so that every kind of row is in a small batch, too
        chosen = [(shift + i) % 4 for i in range(rows)]
        decoded = decode(
            models, [prompts[i] for i in chosen], COUNT, TREES[tree], [params[i] for i in chosen],
            [seeds[i] for i in chosen], page_size=page_size, page_seed=rows,
        )  # fmt: skip
        assert decoded.texts == [expected[i] for i in chosen]


@pytest.mark.parametrize("tree", TREES)
def test_greedy_text_is_the_oracles_in_every_batch(tree):
    models = tiny_models(seed=20)
    prompts = _prompts(_edges(4), seed=1)
    expected = _oracle(models, prompts, [GREEDY] * 4, [0] * 4)
    for rows in (1, 2, 3, 4):
        greedy = [GREEDY] * rows
        decoded = decode(models, prompts[:rows], COUNT, TREES[tree], greedy, range(rows))
        assert decoded.texts == expected[:rows]


@pytest.mark.parametrize("params", [SamplingParams(), FILTERED], ids=["plain", "filtered"])
@pytest.mark.parametrize("tree", ["chain-3", "bushy", "eagle-25"])
def test_text_does_not_depend_on_the_batch(tree, params):
    models = tiny_models(seed=30)
    prompts = _prompts([5, 9, 2], seed=2)
    alone = decode(models, prompts[:1], COUNT, TREES[tree], [params], [77], page_seed=1)
    company = decode(
        models, [prompts[1], prompts[2], prompts[0]], COUNT, TREES[tree],
        [GREEDY, SamplingParams(temperature=2.0), params], [1, 2, 77], page_seed=2,
    )  # fmt: skip
    same_prompt = decode(
        models, [prompts[0], prompts[0]], COUNT, TREES[tree], [params, params], [77, 78]
    )
    assert alone.texts[0] == company.texts[2] == same_prompt.texts[0]
    assert same_prompt.texts[1] != same_prompt.texts[0]


@pytest.mark.parametrize("tree", ["chain-1", "chain-3", "bushy", "eagle-25"])
def test_multi_round_at_temperature_0_is_greedy(tree):
    models = tiny_models(seed=40)
    prompts = _prompts([5, 3, 8], seed=3)
    expected = _oracle(models, prompts, [GREEDY] * 3, [0] * 3)
    decoded = decode(models, prompts, COUNT, TREES[tree], [GREEDY] * 3, range(3), "multi-round")
    assert decoded.texts == expected
    # A greedy row keeps its text beside sampled ones.
    params = [SamplingParams(), GREEDY, FILTERED]
    mixed = decode(models, prompts, COUNT, TREES[tree], params, range(3), "multi-round")
    assert mixed.texts[1] == expected[1]


@pytest.mark.parametrize("rule", ["target-only", "independent"])
@pytest.mark.parametrize("tree", ["chain-3", "bushy"])
def test_baselines_that_follow_matches_keep_the_seed_promise(tree, rule):
    """Seeded text is plain decoding's; the drafts are others than the coupled rule's."""
    models, params = tiny_models(seed=40), [SamplingParams(), GREEDY, FILTERED]
    prompts, seeds = _prompts([5, 3, 8], seed=3), [7, 8, 9]
    decoded = decode(models, prompts, COUNT, TREES[tree], params, seeds, rule)
    assert decoded.texts == _oracle(models, prompts, params, seeds)


def test_block_verification_at_temperature_0_is_greedy():
    models = tiny_models(seed=40, token_ids=REDUCED)
    prompts = _prompts([5, 3, 8], seed=3)
    params = [SamplingParams(), GREEDY, FILTERED]
    decoded = decode(models, prompts, COUNT, TREES["chain-3"], params, range(3), "block")
    assert decoded.texts[1] == _oracle(models, prompts, [GREEDY] * 3, [0] * 3)[1]


# --------------------------------------------------------------------------------- acceptance


@pytest.mark.usefixtures("_attention")
@pytest.mark.parametrize("rule", ["coupled", "multi-round"])
@pytest.mark.parametrize("tree", ["chain-1", "chain-3", "bushy", "eagle-25"])
def test_a_prophetic_draft_is_always_accepted(tree, rule):
    """Full acceptance is the other half of the cache's bookkeeping: whole paths are committed."""
    shape, models = TREES[tree], tiny_models(seed=50)
    prompts = _prompts(_edges(4), seed=4)
    params = [GREEDY] * 4 if rule == "multi-round" else [GREEDY, SamplingParams(), FILTERED, GREEDY]
    seeds = [5, 6, 7, 8]
    said = _oracle(models, prompts, params, seeds, COUNT + shape.depth + 2)
    texts = [prompt + text for prompt, text in zip(prompts, said, strict=True)]
    prophetic = prophetic_models(models, texts)
    decoded = decode(prophetic, prompts, COUNT, shape, params, seeds, rule)
    assert decoded.texts == [text[:COUNT] for text in said]
    assert _accepted(decoded) == {shape.depth}


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), FILTERED], ids=["0", "1", "filtered"])
@pytest.mark.parametrize("tree", ["chain-3", "bushy", "eagle-25"])
def test_a_draft_equal_to_its_target_is_always_accepted(tree, params):
    """Real modules on both sides: the coupled draft shares the noise, so it says the same."""
    models = memoryless_models()
    prompts = _prompts([3, 4, 6], seed=5)
    decoded = decode(models, prompts, COUNT, TREES[tree], [params] * 3, [1, 2, 3])
    assert decoded.texts == _oracle(models, prompts, [params] * 3, [1, 2, 3])
    assert _accepted(decoded) == {TREES[tree].depth}


@pytest.mark.parametrize("rule", ["multi-round", "block"])
def test_a_ratio_of_1_accepts_a_draft_equal_to_its_target(rule):
    """At every first child, whatever the noise."""
    models, params = memoryless_models(), [SamplingParams()] * 3
    decoded = decode(models, _prompts([3, 4, 6]), COUNT, TREES["chain-3"], params, [1, 2, 3], rule)
    assert _accepted(decoded) == {3}


@pytest.mark.parametrize("rule", ["coupled", "target-only", "independent"])
def test_a_text_that_repeats_itself_is_retrieved(rule):
    """The target recites a cycle; the draft knows nothing, so what is accepted was looked up."""
    shape, models = TreeShape.chain(1).retrieving(4), memoryless_models()
    ignorant = tiny_models(seed=70).drafter
    models = DecoderModels(models.target, ignorant)
    prompts, count = _prompts([3, 6], seed=7), 60
    expected = _oracle(models, prompts, [GREEDY] * 2, [1, 2], count)
    decoded = decode(models, prompts, count, shape, [GREEDY] * 2, [1, 2], rule)
    assert decoded.texts == expected
    for rounds in decoded.accepted:
        assert rounds[-3:] == [4, 4, 4], "a cycle that was seen once is foreseen from then on"


def _accepted(decoded: Decoded) -> set[int]:
    return {depth for row in decoded.accepted for depth in row}


# ------------------------------------------------------------------------------ the draft's cache


@pytest.mark.usefixtures("_attention")
@pytest.mark.parametrize("foreseen", [0, 1, 2, 3])
@pytest.mark.parametrize("tree", ["chain-3", "bushy", "lopsided", "eagle-25"])
def test_drafts_are_those_of_a_draft_without_cache(tree, foreseen, monkeypatch):
    """Every drafted token, from the tokens so far and the target's features alone.

    The verifier is told to accept ``foreseen`` levels where it can, so that committed pairs,
    pending pairs and paths through the tree all take part.
    """
    shape, models = TREES[tree], tiny_models(seed=60)
    prompts = _prompts(_edges(4), seed=6)
    drafted = []

    def recording_grow(*args):
        tokens = real_grow(*args)
        drafted.append(tokens)
        return tokens

    real_grow = round_module.grow
    monkeypatch.setattr(round_module, "grow", recording_grow)

    count = 4 if foreseen == 0 else 10
    rule = agreeable_rule(shape, foreseen)
    decoded = decode(models, prompts, count, shape, [GREEDY] * 4, range(4), rule)
    said = [prompt + text for prompt, text in zip(prompts, decoded.texts, strict=True)]
    for row, text in enumerate(said):
        known = len(prompts[row]) + 1
        for tokens, accepted in zip(drafted, decoded.accepted[row], strict=False):
            assert tokens[row].tolist() == _naive_tree(models, shape, text[:known])
            known += accepted + 1
            if known > len(text):
                break


def _naive_tree(models, shape, text) -> list[int]:
    """The tree's tokens after ``text``, each from one draft forward over all pairs."""
    drafter = models.drafter
    tokens, hidden = {(): text[-1]}, {}
    known = features_of(models.target, text[:-1])  # the root is not yet in the target's cache
    for path in ((), *shape.paths):
        said = [tokens[path[:depth]] for depth in range(1, len(path) + 1)]
        predicted = [hidden[path[:depth]] for depth in range(len(path))]
        features = torch.cat([known, *predicted], dim=1)
        pairs = torch.tensor([[*text[1:], *said]])
        count = pairs.shape[1]
        attention = PackedAttention(torch.tensor([0, count], dtype=torch.int32), count)
        out = drafter.draft(
            models.target.embed_tokens(pairs), features, torch.arange(count)[None], attention
        )
        hidden[path] = out[:, -1:]
        ranked = drafter.logits(out[0, -1]).argsort(descending=True).tolist()
        for rank, token in enumerate(ranked[:8]):
            tokens[(*path, rank)] = token
    return [tokens[path] for path in ((), *shape.paths)]


# -------------------------------------------------------------------------------------- the noise


def _noise(seeds, choices, positions, count=20_000, stream=ops.Stream.DRAW):
    noise = ops.gumbel_noise(
        torch.tensor(seeds), torch.tensor(choices), torch.tensor(positions), count, stream
    )
    return noise.flatten(0, 1)


def _assert_uncorrelated(rows):
    """All pairs of rows [n, count], also shifted against each other by one and by four tokens."""
    count = rows.shape[1]
    rows = (rows - rows.mean(-1, keepdim=True)) / rows.std(-1, keepdim=True)
    for shift in (0, 1, 4):
        correlation = rows @ rows.roll(shift, dims=1).T / count
        if shift == 0:
            correlation.fill_diagonal_(0)
        assert float(correlation.abs().max()) < 4.5 / math.sqrt(count)


def test_neighbouring_seeds_choices_and_positions_are_uncorrelated():
    big = 2**40
    _assert_uncorrelated(_noise([0, 1, 2, big, big + 1, 2**32], [0] * 6, [[5]] * 6))
    _assert_uncorrelated(_noise([9] * 4, [0, 1, 2, 3], [[5]] * 4))
    _assert_uncorrelated(_noise([9], [0], [[0, 1, 2, 3, 4]]))
    # The same sum of seed, choice and position is not the same noise.
    _assert_uncorrelated(_noise([3, 4, 3], [1, 0, 0], [[5], [5], [6]]))
    streams = [_noise([9], [0], [[5]], stream=stream) for stream in ops.Stream]
    _assert_uncorrelated(torch.cat(streams))


def test_noise_is_a_function_of_its_key_alone():
    one = _noise([7], [1], [[40]], 30)
    among = _noise([3, 7, 5], [0, 1, 2], [[1, 40], [40, 2], [9, 9]], 50)
    assert torch.equal(one[0], among[2, :30])
    params = [SamplingParams(), GREEDY]
    sampling = SamplingBatch.of(params, [7, 7], torch.device("cpu"))
    key = position_noise(sampling, torch.tensor([[40], [40]]), 30)
    assert torch.equal(key.table[0], _noise([7], [0], [[40]], 30))
    ranked = draw_top(torch.zeros(2, 1, 30), sampling, key, None, None, 30)
    assert torch.equal(ranked[0, 0], key.table[0, 0].argsort(descending=True))
    assert ranked[1, 0].tolist() == list(range(30)), "greedy rows are without noise"
