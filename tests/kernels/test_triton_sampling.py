"""The sampling kernels in Triton's interpreter against their torch twins.

What is kept and what is drawn has to be the same to the token. Words of noise agree to the bit,
noise to rounding; scores that rounding could swap have no chance to meet here.
"""

from __future__ import annotations

import pytest
import torch

from aquiline.core.params import SamplingParams
from aquiline.evaluation.losslessness import chi_square
from aquiline.evaluation.oracle import target_distribution
from aquiline.kernels import noise as noise_module
from aquiline.kernels import ops
from aquiline.kernels import reference_sampling as reference
from aquiline.speculation.tree import TreeShape

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("triton was imported before the interpreter was chosen", allow_module_level=True)

import triton.language as tl  # noqa: E402

from aquiline.kernels.triton import multi_round as kernels_multi_round  # noqa: E402
from aquiline.kernels.triton import sampling as kernels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
VOCABS = [5, 64, 1000, 5003]  # 5003: several chunks, the last one ragged


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def columns(*rows: tuple[float, int, float, float]) -> tuple[torch.Tensor, ...]:
    """temperature, top_k, top_p, min_p of each row, as the operations take them."""
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    return (torch.tensor(temperature), torch.tensor(top_k, dtype=torch.int64),
            torch.tensor(top_p), torch.tensor(min_p))  # fmt: skip


def key_of(rows: int, width: int, vocab: int, stream=ops.Stream.DRAW) -> ops.NoiseKey:
    seeds = torch.tensor([2**62 + 5, 3, 2**32 + 1, 77, 2**40, 9][:rows])
    positions = 1000 * torch.arange(rows)[:, None] + 3 * torch.arange(width) + 2**31 - 2
    return ops.NoiseKey(seeds, torch.arange(rows), positions, stream, vocab)


# ------------------------------------------------------------------------------------- the noise


@triton.jit
def _noise_kernel(words, noise, COUNT: tl.constexpr):
    lanes = tl.arange(0, COUNT)
    tl.store(noise + lanes, kernels._gumbel(tl.load(words + lanes).to(tl.uint32)))


@triton.jit
def _words_kernel(seed, position, choice, ids, words, COUNT: tl.constexpr):
    lanes = tl.arange(0, COUNT)
    tokens = tl.load(ids + lanes).to(tl.uint32)
    zero = tokens & 0
    place = zero + tl.load(position).to(tl.uint32)
    of = zero + tl.load(choice).to(tl.uint32)
    word = kernels._word(tl.load(seed), tokens, place, of, 2)
    tl.store(words + lanes, word.to(tl.int64))


def test_words_are_the_definition_to_the_bit():
    ids = torch.tensor([0, 1, 2, 3, 4, 7, 128255, 128256, 30, 31, 33, 99, 2**20, 5, 6, 8])
    for seed, position, choice in ((0, 0, 0), (2**63 - 1, 2**32 + 7, 3), (-5, 131072, 1)):
        key = torch.tensor([seed]), torch.tensor([choice]), torch.tensor([[position]])
        expected = noise_module._bits(*key, 2**20 + 1, ops.Stream.ACCEPT)[0, 0, ids]
        words = torch.empty(16, dtype=torch.int64)
        _words_kernel[(1,)](key[0], key[2], key[1], ids, words, 16)
        assert torch.equal(words, expected)


def test_noise_is_the_definition(monkeypatch):
    """Over the whole range and at its ends, where careless fp32 fails."""
    edges = [0, 1, 2, 2**8, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 129, 2**32 - 2, 2**32 - 1]
    generator = torch.Generator().manual_seed(0)
    spread = [torch.randint(2**power, (128,), generator=generator) for power in range(2, 33)]
    words = torch.cat((torch.tensor(edges), *spread, 2**32 - 1 - torch.arange(117)))
    assert len(words) == 4096
    monkeypatch.setattr(noise_module, "_bits", lambda *_: words)
    zero = torch.zeros(1, dtype=torch.int64)
    expected = ops.gumbel_noise(zero, zero, zero[None], len(words))
    noise = torch.empty(len(words))
    _noise_kernel[(1,)](words, noise, len(words))
    torch.testing.assert_close(noise, expected, rtol=5e-7, atol=5e-7)


# ------------------------------------------------------------------------------------- the floor

FILTERS = {
    "none": [(1.0, 0, 1.0, 0.0), (0.0, 3, 0.5, 0.5)],
    "top-k": [(1.0, 1, 1.0, 0.0), (0.7, 7, 1.0, 0.0), (1.3, 40, 1.0, 0.0), (1.0, 10**6, 1.0, 0.0)],
    "top-p": [(1.0, 0, 0.9, 0.0), (0.6, 0, 0.1, 0.0), (2.0, 0, 0.999, 0.0), (1e-9, 0, 0.5, 0.0)],
    "min-p": [(1.0, 0, 1.0, 0.1), (0.7, 0, 1.0, 1.0)],
    "all": [(1.3, 30, 0.9, 0.01), (0.8, 12, 0.5, 0.2), (0.0, 2, 0.3, 0.9), (1.0, 0, 1.0, 0.0)],
}


def assert_same_floor(logits, params):
    floor, exact = kernels.score_floor(logits, *params), reference.score_floor(logits, *params)
    scores = reference.scaled_scores(logits, params[0])
    assert floor.dtype == torch.float32
    assert floor.shape == logits.shape[:2]
    assert torch.equal(scores >= floor[..., None], scores >= exact[..., None])


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("filters", FILTERS)
def test_the_floor_keeps_the_same_tokens(filters, vocab):
    params = columns(*FILTERS[filters])
    assert_same_floor(random_logits(len(params[0]), 2, vocab, seed=vocab), params)


def test_rows_without_filters_and_greedy_rows_have_no_floor():
    params = columns(*FILTERS["none"])
    floor = kernels.score_floor(random_logits(2, 3, 64), *params)
    assert torch.equal(floor, torch.full((2, 3), float("-inf")))


@pytest.mark.parametrize("seed", range(3))
def test_ties_with_the_last_token_kept_are_kept(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [(1.0, 5, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (1.0, 0, 1.0, 0.36), (0.5, 9, 0.7, 0.1)]
    logits = torch.randint(-2, 3, (4, 3, 50), generator=generator).float()
    logits[:, 1] *= -0.0  # both zeros are one score
    logits[:, 1, ::2] = 0.0
    logits[:, 2, 7:] = float("-inf")  # forbidden tokens
    assert_same_floor(logits, columns(*rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_and_views(dtype):
    logits = random_logits(3, 5, 300).to(dtype)[:, 1::2]
    params = columns((0.7, 20, 0.9, 0.0), (1.0, 0, 0.8, 0.02), (0.0, 0, 1.0, 0.0))
    assert_same_floor(logits, params)
    assert_same_floor(logits.transpose(1, 2).contiguous().transpose(1, 2), params)
    floor = reference.score_floor(logits, *params)
    assert_same_draw(logits, floor, params[0], key_of(3, 2, 300), None, None, 2)


def test_a_row_of_nans_ends():
    logits = torch.full((2, 1, 64), float("nan"))
    params = columns((1.0, 3, 0.5, 0.1), (1.0, 0, 0.9, 0.0))
    floor = kernels.score_floor(logits, *params)
    drawn = kernels.draw_top(logits, floor, params[0], key_of(2, 1, 64), None, None, 3)
    assert sorted(drawn[0, 0].tolist()) == sorted(set(drawn[0, 0].tolist()))
    assert bool(((drawn >= 0) & (drawn < 64)).all())


# -------------------------------------------------------------------------------------- the draw


def assert_same_draw(logits, floor, temperature, key, levels, token_ids, count):
    """The same tokens in the same order among those kept; distinct ones behind them."""
    args = (logits, floor, temperature, key, levels, token_ids, count)
    drawn, exact = kernels.draw_top(*args), reference.draw_top(*args)
    kept = torch.full(logits.shape[:2], logits.shape[-1])
    if floor is not None and key is not None:
        scores = reference.scaled_scores(logits, temperature)
        kept = (scores >= floor[..., None]).sum(-1)
    assert drawn.shape == (*logits.shape[:2], count)
    ours, theirs = drawn.flatten(0, 1).tolist(), exact.flatten(0, 1).tolist()
    for one, other, size in zip(ours, theirs, kept.flatten().tolist(), strict=True):
        assert one[:size] == other[:size]
        assert len(set(one)) == len(set(other)) == count
        assert all(0 <= index < logits.shape[-1] for index in one)


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("vocab", VOCABS)
def test_the_draw_is_the_twins(vocab, count):
    params = columns(*FILTERS["all"], (1.0, 0, 1.0, 0.0), (0.6, 2, 1.0, 0.0))
    logits = random_logits(6, 2, vocab, seed=count)
    floor = reference.score_floor(logits, *params)
    levels = torch.tensor([3, 0])
    key = key_of(6, 4, vocab)
    assert_same_draw(logits, floor, params[0], key, levels, None, count)
    assert_same_draw(logits, None, params[0], key, None, None, count)
    assert_same_draw(logits, None, params[0], None, None, None, count)


@pytest.mark.parametrize("stream", ops.Stream)
def test_the_draw_of_a_reduced_vocabulary(stream):
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randperm(6000, generator=generator)[:2500].sort().values
    params = columns((1.0, 0, 0.9, 0.0), (0.7, 50, 1.0, 0.0), (0.0, 0, 1.0, 0.0))
    logits = random_logits(3, 2, 2500)
    key = key_of(3, 2, 6000, stream)
    floor = reference.score_floor(logits, *params)
    assert_same_draw(logits, floor, params[0], key, torch.tensor([1, 1]), token_ids, 4)


def test_equal_scores_go_to_the_lowest_index():
    logits = torch.zeros(1, 2, 5000)
    logits[0, 0, [4999, 2500, 7, 2047, 2048]] = 1.0
    drawn = kernels.draw_top(logits, None, torch.zeros(1), key_of(1, 2, 5000), None, None, 8)
    assert drawn.tolist() == [[[7, 2047, 2048, 2500, 4999, 0, 1, 2], list(range(8))]]
    assert_same_draw(logits, None, torch.zeros(1), key_of(1, 2, 5000), None, None, 8)


def test_all_of_a_tiny_vocabulary():
    logits = random_logits(2, 1, 3)
    logits[1, 0, 1] = float("-inf")
    floor = torch.tensor([[1e9], [-1e9]])
    for args in ((floor, key_of(2, 1, 3)), (None, key_of(2, 1, 3)), (None, None)):
        drawn = kernels.draw_top(logits, args[0], torch.ones(2), args[1], None, None, 3)
        assert drawn.sort(dim=-1).values.tolist() == [[[0, 1, 2]]] * 2
        assert drawn[1, 0, 2] == 1


def test_the_law_of_the_draw():
    """One row per position, so each is a draw of its own."""
    rows, vocab = 500, 16
    logits = 0.75 * random_logits(vocab, seed=2)
    params = SamplingParams(temperature=0.9, top_p=0.9)
    columns_ = columns((params.temperature, 0, params.top_p, 0.0))
    floor = kernels.score_floor(logits[None, None], *columns_).expand(1, rows).contiguous()
    zero = torch.zeros(1, dtype=torch.int64)
    key = ops.NoiseKey(zero + 11, zero, torch.arange(rows)[None], ops.Stream.DRAW, vocab)
    spread = logits.expand(1, rows, vocab)
    drawn = kernels.draw_top(spread, floor, columns_[0], key, None, None, 1)
    counts = torch.bincount(drawn.flatten(), minlength=vocab)
    assert chi_square(counts, rows * target_distribution(logits, params)) > 1e-4


# ----------------------------------------------------------------------------------- multi-round

CHILDREN = {  # of each node
    "root": [[]],
    "chain": [[1], [2], []],
    "siblings": [[1, 2, 3, 4], [], [], [], []],
    "bushy": [[1, 2, 3], [4, 5], [6], [], [7], [], [], []],
}


def multi_round_case(tree: str, vocab: int, token_ids, filters, rows: int, seed: int):
    """Arguments of multi_round_accept with children drawn as the rule draws them, by chance."""
    children = CHILDREN[tree]
    width = max(1, *map(len, children))
    expanded = [node for node, nodes in enumerate(children) if nodes]
    params = columns(*(filters[row % len(filters)] for row in range(rows)))
    target = random_logits(rows, len(children), vocab, seed=seed)
    draft = random_logits(rows, len(expanded), vocab, seed=seed + 1)
    draft += target[:, expanded]
    if token_ids is not None:
        draft = draft[..., token_ids].contiguous()
    floor = reference.score_floor(draft, *params)
    tokens = torch.zeros(rows, len(children), dtype=torch.int64)
    propose = torch.arange(rows) + seed, torch.arange(rows), torch.arange(rows)[:, None] + 9
    for place, node in enumerate(expanded):
        key = ops.NoiseKey(*propose, ops.Stream.PROPOSE, vocab)
        count = len(children[node])
        row, low = draft[:, place : place + 1], floor[:, place : place + 1]
        ids = reference.draw_top(row, low, params[0], key, None, token_ids, count)[:, 0]
        tokens[:, children[node]] = ids if token_ids is None else token_ids[ids]
    table = torch.tensor([[*nodes, *[-1] * (width - len(nodes))] for nodes in children])
    index = torch.tensor([expanded.index(n) if n in expanded else 0 for n in range(len(children))])
    places = None
    if token_ids is not None:
        places = torch.full((vocab,), -1)
        places[token_ids] = torch.arange(len(token_ids))
    positions = torch.arange(rows)[:, None] * 10 + torch.arange(5)
    seeds = torch.arange(rows) + 2**40 + seed
    keys = [ops.NoiseKey(seeds, torch.arange(rows), positions, stream, vocab)
            for stream in (ops.Stream.ACCEPT, ops.Stream.RESIDUAL)]  # fmt: skip
    return (target, reference.score_floor(target, *params), draft, floor, tokens, params[0], table,
            index, places, *keys)  # fmt: skip


@pytest.mark.parametrize("reduced", [False, True], ids=["whole", "reduced"])
@pytest.mark.parametrize("tree", CHILDREN)
def test_the_walk_is_the_twins(tree, reduced):
    vocab = 20 if tree in ("chain", "bushy") else 70
    token_ids = torch.arange(1, vocab, 2) if reduced else None
    filters = [(1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.8, 3, 1.0, 0.0), (1.4, 9, 0.9, 0.02)]
    args = multi_round_case(tree, vocab, token_ids, filters, rows=24, seed=len(tree))
    leaf, bonus = kernels_multi_round.multi_round_accept(*args)
    exact_leaf, exact_bonus = reference.multi_round_accept(*args)
    assert torch.equal(leaf, exact_leaf)
    assert torch.equal(bonus, exact_bonus)
    assert tree == "root" or len(leaf.unique()) > 1, "all the same: nothing was tested"


def test_the_walk_without_floors_over_several_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "ROW_BLOCK", 64)
    args = list(multi_round_case("bushy", 150, None, [(1.0, 0, 1.0, 0.0)], rows=12, seed=4))
    args[1] = args[3] = None
    args[0], args[2] = args[0].bfloat16(), args[2].bfloat16()
    leaf, bonus = kernels_multi_round.multi_round_accept(*args)
    exact_leaf, exact_bonus = reference.multi_round_accept(*args)
    assert torch.equal(leaf, exact_leaf)
    assert torch.equal(bonus, exact_bonus)


@pytest.mark.parametrize("drafted", [False, True], ids=["nothing drafted", "some drafted"])
def test_the_walk_where_tokens_are_banned(drafted):
    """The target may say few tokens; the draft's row may hold none of them."""
    filters = [(1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.8, 3, 0.9, 0.0)]
    args = list(multi_round_case("bushy", 20, None, filters, rows=24, seed=8))
    args[0][..., ::2] = float("-inf")
    args[2][..., :: 2 if drafted else 1] = float("-inf")
    params = columns(*(filters[row % 3] for row in range(24)))
    for logits, floor in ((0, 1), (2, 3)):
        args[floor] = reference.score_floor(args[logits], *params)
    leaf, bonus = kernels_multi_round.multi_round_accept(*args)
    exact_leaf, exact_bonus = reference.multi_round_accept(*args)
    assert torch.equal(leaf, exact_leaf)
    assert torch.equal(bonus, exact_bonus)
    assert bool((bonus % 2 == 1).all())
    assert drafted == bool((leaf > 0).any())


@pytest.mark.parametrize("name", ["chain-3", "eagle-25", "tree-8"])
def test_follow_matches(name):
    """Tokens of few kinds, so that paths of every length occur."""
    tree = TreeShape.named(name).tables(torch.device("cpu"))
    tokens = torch.randint(3, (40, tree.shape.size))
    drawn = torch.randint(3, (40, tree.shape.size))
    arguments = tokens, drawn, tree.parents, tree.ancestors, tree.routes
    got, expected = kernels.follow_matches(*arguments), reference.follow_matches(*arguments)
    assert expected[0].unique().numel() > 2
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
