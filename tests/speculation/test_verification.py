"""The two rules on cases small enough to walk by hand; their laws are tested in tests/laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquiline.core.errors import AquilineError
from aquiline.core.params import SamplingParams
from aquiline.kernels import ops
from aquiline.kernels.reference_sampling import after_rejection
from aquiline.sampling.batch import SamplingBatch
from aquiline.sampling.draw import draw, position_noise
from aquiline.speculation.tree import TreeShape
from aquiline.speculation.verification import block, coupled, multi_round
from aquiline.speculation.verification.noise import RoundNoise
from aquiline.speculation.verification.rules import RULES
from tests.speculation.test_tree import trees

CPU = torch.device("cpu")
BUSHY = TreeShape.of([[0], [1], [2], [0, 0], [0, 1], [1, 0]])  # nodes 1 2 3, then 4 5 6


def batch_of(rows: int, **params) -> SamplingBatch:
    return SamplingBatch.of([SamplingParams(**params)] * rows, range(100, 100 + rows), CPU)


# --------------------------------------------------------------------------------------- coupled


def walk(shape, tokens, drawn):
    """Accepted tokens, nodes and bonus token of one request, node by node."""
    node, path, emitted = 0, [0], []
    while True:
        emitted.append(drawn[node])
        match = [child for child in shape.children[node] if tokens[child] == drawn[node]]
        if not match:
            return path, emitted
        node = match[0]
        path.append(node)


@settings(max_examples=150, deadline=None)
@given(shape=trees(), seed=st.integers(0, 2**32))
def test_coupled_accept_is_a_walk(shape, seed):
    batch, vocab = 8, 15
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(batch, shape.size, dtype=torch.int64)
    tokens[:, 0] = torch.randint(vocab, (batch,), generator=generator)
    for children in shape.children:  # siblings differ
        order = torch.rand(batch, vocab, generator=generator).argsort(dim=-1)
        tokens[:, list(children)] = order[:, : len(children)]
    drawn = torch.randint(vocab, (batch, shape.size), generator=generator)
    for row in range(batch):  # half of the draws are some child's token
        for node, children in enumerate(shape.children):
            if children and (row + node) % 2:
                pick = int(torch.randint(len(children), (), generator=generator))
                drawn[row, node] = tokens[row, children[pick]]
    verdict = coupled.accept(shape.tables(CPU), tokens, drawn)
    for row in range(batch):
        path, emitted = walk(shape, tokens[row].tolist(), drawn[row].tolist())
        accepted = int(verdict.accepted[row])
        assert accepted == len(path) - 1
        assert verdict.path[row].tolist() == path + [path[-1]] * (shape.depth - accepted)
        assert verdict.tokens[row, : accepted + 1].tolist() == emitted


def test_coupled_draws_every_depth_with_the_noise_of_its_position():
    tree, sampling = BUSHY.tables(CPU), batch_of(5, temperature=0.8, top_p=0.9)
    positions = torch.arange(5)[:, None] * 7 + torch.arange(3)
    logits = torch.randn(5, BUSHY.size, 11, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(BUSHY.size).expand(5, -1).clone()
    rule = RULES["coupled"](RoundNoise(tree, sampling, positions, 11, None))
    verdict = rule.accept(tokens, logits)
    for node in range(BUSHY.size):
        noise = position_noise(sampling, positions[:, BUSHY.depths[node], None], 11)
        drawn = draw(logits[:, node : node + 1], sampling, noise)[:, 0]
        on_path = verdict.path == node
        if node:
            on_path &= torch.arange(3) <= verdict.accepted[:, None]
        for row, depth in on_path.nonzero().tolist():
            assert int(verdict.tokens[row, depth]) == int(drawn[row])


@pytest.mark.parametrize("reduced", [False, True])
def test_coupled_children_are_ranked_by_log_probability_plus_the_coming_noise(reduced):
    ids = torch.tensor([3, 4, 8, 10]) if reduced else None
    sampling = batch_of(2, temperature=0.5)
    positions = torch.tensor([[5, 6, 7], [9, 10, 11]])
    logits = torch.randn(2, 2, 4 if reduced else 11, generator=torch.Generator().manual_seed(1))
    rule = RULES["coupled"](RoundNoise(BUSHY.tables(CPU), sampling, positions, 11, ids))
    noise = position_noise(sampling, positions[:, 1:2], 11)
    expected = logits / 0.5 + (noise.table if ids is None else noise.table[..., ids])
    assert torch.equal(rule.propose(logits, 2, 3), expected.topk(3).indices)


# ------------------------------------------------------------------------------------ multi-round

SIBLINGS = TreeShape.of([[0], [1]])


def one_hot(*tokens: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), 4).float()


def accept_of(shape, tokens, target, draft, rows=1, seed=100):
    sampling = SamplingBatch.of([SamplingParams()] * rows, range(seed, seed + rows), CPU)
    positions = torch.arange(shape.depth + 1).expand(rows, -1) + 20

    def spread(x):
        return x.expand(rows, *x.shape)

    tree = shape.tables(CPU)
    expanded = torch.cat(tree.expanded_nodes)
    return multi_round.accept(
        RoundNoise(tree, sampling, positions, target.shape[-1], None), spread(torch.tensor(tokens)),
        spread(target).log(), spread(draft).log()[:, expanded],
    )  # fmt: skip


def test_multi_round_accepts_a_draft_equal_to_its_target():
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(4, 4)
    chain = TreeShape.chain(3)
    verdict = accept_of(chain, [0, 3, 1, 2], probs, probs, rows=50)
    assert verdict.accepted.tolist() == [3] * 50
    assert verdict.tokens[:, :3].tolist() == [[3, 1, 2]] * 50
    assert verdict.path.tolist() == [[0, 1, 2, 3]] * 50
    assert len(set(verdict.tokens[:, 3].tolist())) > 1, "the bonus token is drawn, not chosen"


def test_multi_round_rejects_what_the_target_cannot_say():
    target = one_hot(2, 0, 0)
    draft = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 3)
    verdict = accept_of(SIBLINGS, [3, 0, 1], target, draft, rows=50)
    assert verdict.accepted.tolist() == [0] * 50
    assert verdict.tokens[:, 0].tolist() == [2] * 50
    assert verdict.path.tolist() == [[0, 0]] * 50


def test_multi_round_tries_the_second_sibling_with_the_residual():
    """target (0, .5, .5, 0), draft (.5, .5, 0, 0): after 0 is rejected, 1 has draft probability 1
    and residual 0 at 1, for 0.5 of it are spent: it must be rejected, and 2 emitted."""
    target = torch.tensor([[0.0, 0.5, 0.5, 0.0]] * 3)
    draft = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 3)
    verdict = accept_of(SIBLINGS, [3, 0, 1], target, draft, rows=50)
    assert verdict.accepted.tolist() == [0] * 50
    assert verdict.tokens[:, 0].tolist() == [2] * 50
    # Proposed first, 1 is accepted for sure (ratio 1), and its own row supplies the next token.
    target = torch.cat((target[:1], one_hot(3, 0)))
    verdict = accept_of(SIBLINGS, [3, 1, 0], target, draft, rows=50)
    assert verdict.accepted.tolist() == [1] * 50
    assert verdict.tokens.tolist() == [[1, 3]] * 50
    assert verdict.path.tolist() == [[0, 1]] * 50


def test_multi_round_accepts_the_second_sibling_and_goes_on_below_it():
    shape = TreeShape.of(
        [[0], [1], [0, 0], [1, 0]]
    )  # nodes 1 2 below the root, 3 under 1, 4 under 2
    target = torch.cat((one_hot(2), one_hot(0), one_hot(1), one_hot(0), one_hot(3)))
    draft = torch.full((5, 4), 0.25)
    verdict = accept_of(shape, [0, 3, 2, 0, 1], target, draft, rows=20)
    assert verdict.accepted.tolist() == [2] * 20
    assert verdict.path.tolist() == [[0, 2, 4]] * 20
    assert verdict.tokens.tolist() == [[2, 1, 3]] * 20


def test_multi_round_never_takes_a_child_that_the_draft_could_not_have_drawn():
    """With one token in the draft's support the second child is filler, whatever its target."""
    target = torch.tensor([[0.0, 0.5, 0.5, 0.0]] * 3)
    draft = one_hot(0, 0, 0)
    verdict = accept_of(SIBLINGS, [3, 0, 1], target, draft, rows=200)
    assert verdict.accepted.tolist() == [0] * 200
    assert set(verdict.tokens[:, 0].tolist()) == {1, 2}


def test_multi_round_acceptance_is_the_ratio():
    target = torch.tensor([[0.2, 0.8, 0.0, 0.0]] * 2)
    draft = torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 2)
    rows = 20_000
    verdict = accept_of(TreeShape.chain(1), [3, 0], target, draft, rows=rows)
    share = verdict.accepted.double().mean()
    assert abs(float(share) - 0.4) < 4 * (0.4 * 0.6 / rows) ** 0.5
    rejected = verdict.tokens[verdict.accepted == 0, 0]
    assert rejected.unique().tolist() == [1]
    uniforms = ops.uniform_noise(
        torch.arange(100, 100 + rows), torch.zeros(rows, dtype=torch.int64),
        torch.full((rows, 1), 20), 1, ops.Stream.ACCEPT,
    )  # fmt: skip
    assert torch.equal(verdict.accepted == 1, uniforms[:, 0, 0] * 0.5 < target[0, 0])


def test_after_rejection_by_hand():
    residual = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    proposal = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    left, remaining = after_rejection(residual, proposal, torch.tensor([0]))
    torch.testing.assert_close(left, torch.tensor([[0.0, 0.0, 0.25, 0.75]]))
    torch.testing.assert_close(remaining, torch.tensor([[0.0, 0.5, 1 / 3, 1 / 6]]))
    # Nothing left of either: both stay finite.
    left, remaining = after_rejection(one_hot(1), one_hot(1), torch.tensor([1]))
    assert left.tolist() == one_hot(1).tolist()
    assert remaining.tolist() == [[0.0] * 4]


def test_multi_round_children_are_draws_without_replacement():
    """The first child follows the draft's law, the second the law renormalised without it."""
    rows, vocab = 40_000, 4
    sampling = batch_of(rows)
    positions = torch.zeros(rows, 2, dtype=torch.int64) + 3
    rule = RULES["multi-round"](RoundNoise(SIBLINGS.tables(CPU), sampling, positions, vocab, None))
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4])
    pairs = rule.propose(probs.log().expand(rows, 1, vocab), 1, 2)[:, 0]
    for first in range(vocab):
        for second in range(vocab):
            share = float((pairs == torch.tensor([first, second])).all(-1).double().mean())
            exact = 0.0
            if first != second:
                exact = float(probs[first] * probs[second] / (1 - probs[first]))
            assert abs(share - exact) <= 4 * (exact * (1 - exact) / rows) ** 0.5


# -------------------------------------------------------------------------------------- baselines


def proposals(rule: str, logits: torch.Tensor) -> torch.Tensor:
    """The root's children of five requests."""
    positions = torch.arange(5)[:, None] * 7 + torch.arange(3)
    context = RoundNoise(BUSHY.tables(CPU), batch_of(5, temperature=0.8), positions, 11, None)
    return RULES[rule](context).propose(logits, 1, 3)


def test_baselines_differ_from_coupled_in_their_children_alone():
    logits = torch.randn(5, 1, 11, generator=torch.Generator().manual_seed(2))
    assert torch.equal(proposals("target-only", logits), logits.topk(3).indices)
    independent = proposals("independent", logits)
    assert torch.equal(independent, proposals("multi-round", logits))
    assert not torch.equal(independent, proposals("coupled", logits))


def block_of(tokens, target, draft, rows):
    """Verdicts of ``rows`` requests that share a chain of 2."""
    positions = torch.arange(3).expand(rows, -1) + 20
    tree = TreeShape.chain(2).tables(CPU)
    context = RoundNoise(tree, batch_of(rows), positions, 4, None)

    def spread(x):
        return x.expand(rows, *x.shape)

    return block.accept(context, spread(torch.tensor(tokens)), spread(target), spread(draft))


def test_block_verification_by_hand():
    """Tokens 0, 0 with P = (.2, .8) then (1, 0), Q = (.5, .5) then (.5, .5): w = .4, then .8.

    R after node 1 is max(0, .4 (1, 0) - .5) = 0, so it never ends a round: node 1 alone would be
    taken with probability .4 by the ratio rule, here both are, with .8, or none.
    """
    target = torch.tensor([[0.2, 0.8, 0, 0], [1, 0, 0, 0], [0, 0, 0.5, 0.5]])
    draft = torch.tensor([[0.5, 0.5, 0, 0]] * 2)
    rows = 20_000
    verdict = block_of([3, 0, 0], target, draft, rows)
    assert verdict.accepted.unique().tolist() == [0, 2]
    share = float((verdict.accepted == 2).double().mean())
    assert abs(share - 0.8) < 4 * (0.8 * 0.2 / rows) ** 0.5
    both = verdict.tokens[verdict.accepted == 2]
    assert both[:, :2].unique().tolist() == [0]
    assert both[:, 2].unique().tolist() == [2, 3]
    none = verdict.tokens[verdict.accepted == 0]
    assert none[:, 0].unique().tolist() == [1]


def test_block_verification_survives_a_greedy_tie_broken_differently():
    """The draft's one-hot misses the child: it is taken exactly if it is the target's token."""
    verdict = block_of([3, 1, 2], one_hot(1, 2, 0), one_hot(0, 2), rows=3)
    assert verdict.tokens.tolist() == [[1, 2, 0]] * 3
    verdict = block_of([3, 1, 2], one_hot(3, 2, 0), one_hot(0, 2), rows=3)
    assert verdict.accepted.tolist() == [0] * 3
    assert verdict.tokens[:, 0].tolist() == [3] * 3


def test_block_noise_has_a_key_of_its_own_in_every_round():
    tree = TreeShape.chain(3).tables(CPU)
    positions = torch.arange(50)[:, None] + torch.arange(4)  # rounds one token apart
    keys = block.round_keys(RoundNoise(tree, batch_of(50), positions, 4, None))
    assert len(keys.unique()) == keys.numel()


def test_block_verification_refuses_a_tree():
    context = RoundNoise(BUSHY.tables(CPU), batch_of(1), torch.arange(3)[None], 4, None)
    with pytest.raises(AquilineError, match="verification='block'"):
        RULES["block"](context)
