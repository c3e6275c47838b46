"""probabilities() against an oracle that walks down the sorted tokens one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aquiline.core.params import SamplingParams
from aquiline.evaluation.oracle import target_distribution
from aquiline.kernels import ops
from aquiline.sampling.batch import SamplingBatch
from aquiline.sampling.filters import probabilities, score_floor

CPU = torch.device("cpu")

params_strategy = st.builds(
    SamplingParams,
    temperature=st.one_of(st.just(0.0), st.just(1.0), st.floats(0.2, 5.0)),
    top_k=st.one_of(st.just(0), st.integers(1, 60)),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
)
logits_strategy = st.builds(
    lambda seed, vocab, scale: (
        scale * torch.randn(vocab, generator=torch.Generator().manual_seed(seed)).double()
    ),
    st.integers(0, 2**32),
    st.integers(2, 40),
    st.sampled_from([0.3, 1.0, 4.0]),
)


def on_an_edge(logits, params) -> bool:
    """Whether fp32 parameters could put a token on the other side of a filter than exact ones."""
    if params.temperature == 0:
        return False
    scores = logits / params.temperature
    ranked = scores.sort(descending=True).values
    if params.top_k:
        ranked = ranked[: params.top_k]
    mass = ranked.softmax(-1).cumsum(-1)
    relative = (ranked - ranked[0]).exp()
    near_top_p = params.top_p < 1 and bool(((mass - params.top_p).abs() < 1e-5).any())
    near_min_p = bool(((relative - params.min_p).abs() < 1e-5)[1:].any())
    return near_top_p or (params.min_p > 0 and near_min_p)


def batch_of(*params: SamplingParams) -> SamplingBatch:
    return SamplingBatch.of(params, range(len(params)), CPU)


@settings(max_examples=300, deadline=None)
@given(logits=logits_strategy, params=params_strategy)
def test_probabilities_are_the_oracles(logits, params):
    assume(not on_an_edge(logits, params))
    probs = probabilities(logits[None, None], batch_of(params))[0, 0]
    exact = target_distribution(logits, params)
    assert ((probs > 0) == (exact > 0)).all()
    torch.testing.assert_close(probs, exact, rtol=1e-5, atol=1e-7)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), params=st.lists(params_strategy, min_size=2, max_size=5))
def test_every_row_has_its_own_parameters(seed, params):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(len(params), 3, 30, generator=generator).double()
    for rows, one in zip(logits, params, strict=True):
        assume(not any(on_an_edge(row, one) for row in rows))
    probs = probabilities(logits, batch_of(*params))
    for ours, rows, one in zip(probs, logits, params, strict=True):
        torch.testing.assert_close(ours, target_distribution(rows, one), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_logits_are_filtered_in_fp32(dtype):
    logits = torch.randn(4, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02)
    assert not any(on_an_edge(row.double(), params) for row in logits.flatten(0, 1))
    probs = probabilities(logits, batch_of(*[params] * 4))
    assert probs.dtype == torch.float32
    exact = target_distribution(logits, params)
    torch.testing.assert_close(probs.double(), exact, rtol=1e-4, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=2, max_size=12), k=st.integers(1, 12)
)
def test_ties_with_the_last_token_kept_are_kept(values, k):
    logits = torch.tensor(values).double()
    for params in (SamplingParams(top_k=k), SamplingParams(top_p=0.37), SamplingParams(min_p=0.36)):
        probs = probabilities(logits[None, None], batch_of(params))[0, 0]
        torch.testing.assert_close(probs, target_distribution(logits, params))


def test_greedy_rows_come_back_undivided_and_uncut():
    logits = torch.tensor([[[0.0, 3.0, 3.0, 1.0]]]).expand(2, 1, 4)
    greedy = SamplingParams(temperature=0, top_k=1, top_p=0.1, min_p=1.0)
    batch = batch_of(greedy, SamplingParams(temperature=2.0, top_k=3))
    assert ops.scaled_scores(logits, batch.temperature)[0].tolist() == [[0.0, 3.0, 3.0, 1.0]]
    floor = score_floor(logits, batch)
    assert floor is not None
    assert floor[0].tolist() == [float("-inf")]
    assert probabilities(logits, batch)[0].tolist() == [[0.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38])
def test_a_tiny_temperature_is_greedy(temperature):
    """The limit of the law: no overflow on the way, whatever positive number is given."""
    logits = torch.tensor([[[5.0, 9.0, 30.0, 29.0, -40.0]]])
    probs = probabilities(logits, batch_of(SamplingParams(temperature=temperature)))
    assert probs[0, 0].tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]
