"""Rows of the adjustment table: what is written, and that nothing of an earlier request is left."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquiline.core.params import MAX_BIASED, SamplingParams
from aquiline.evaluation.oracle import adjusted_logits
from aquiline.kernels import adjustments as limits
from aquiline.kernels import ops
from aquiline.sampling.adjust import Adjustments, flags_of
from aquiline.sampling.batch import SamplingBatch

CPU = torch.device("cpu")
VOCAB = 70
TOKENS = st.integers(0, VOCAB - 1)
TEXTS = st.lists(TOKENS, max_size=12)
FULL = SamplingParams(
    repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=1.0, min_tokens=4, logprobs=1,
    logit_bias=dict.fromkeys(range(VOCAB), 3.0), banned_token_ids=(0, 31, 32, 63, 64),
)  # fmt: skip
PARAMS = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.9]),
    presence_penalty=st.sampled_from([0.0, 1.1]),
    frequency_penalty=st.sampled_from([0.0, -0.6]),
    logit_bias=st.none() | st.dictionaries(TOKENS, st.floats(-3, 3), max_size=5),
    allowed_token_ids=st.none() | st.lists(TOKENS, min_size=1, max_size=40).map(tuple),
    min_tokens=st.integers(0, 9),
)


def adjusted(table: Adjustments, row: int, logits: torch.Tensor, position: int) -> torch.Tensor:
    out = logits[None, None].clone()
    ops.adjust_logits(
        out, table, torch.tensor([row]), torch.tensor([[position]]), None, None, None, None, None
    )
    return out[0, 0]


@settings(max_examples=60, deadline=None)
@given(PARAMS, TEXTS, TEXTS, st.lists(TOKENS, max_size=5))
def test_a_row_used_again_holds_the_new_request_alone(params, prompt, output, ends):
    logits = torch.linspace(-3, 3, VOCAB, dtype=torch.float64)
    table = Adjustments.empty(2, VOCAB, CPU)
    table.set(1, FULL, range(VOCAB), range(0, VOCAB, 3), range(60))
    table.set(1, params, prompt, output, ends)
    expected = adjusted_logits(logits, params, prompt, output, ends)
    found = adjusted(table, 1, logits, len(prompt) + len(output))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(adjusted(table, 0, logits, 0), logits)


def test_flags():
    assert flags_of(SamplingParams(temperature=0.3, top_k=4, seed=5)) == 0
    every = ops.Flag.PENALTIES | ops.Flag.BIAS | ops.Flag.BANS | ops.Flag.MIN_TOKENS
    assert flags_of(FULL) == every | ops.Flag.LOGPROBS
    assert flags_of(SamplingParams(logprobs=0)) == ops.Flag.LOGPROBS
    assert flags_of(SamplingParams(repetition_penalty=0.9)) == ops.Flag.PENALTIES
    assert flags_of(SamplingParams(allowed_token_ids=(1,))) == ops.Flag.BANS


def test_the_table_has_room_for_what_the_parameters_admit():
    assert limits.MAX_BIASED == MAX_BIASED
    for size in (limits.MAX_BIASED, limits.MAX_ENDS):
        assert size & (size - 1) == 0, "rows are searched by halving"


def test_counts_stop_at_the_largest():
    table = Adjustments.empty(1, VOCAB, CPU)
    table.set(0, FULL, (), [3] * (ops.MAX_COUNT + 5), ())
    assert table.counts[0, 3] == ops.MAX_COUNT
    ops.count_tokens(table, torch.tensor([0]), torch.tensor([[3]]), torch.tensor([1]))
    assert table.counts[0, 3] == ops.MAX_COUNT


def test_a_batch_knows_on_the_host_what_nobody_asked_for():
    table = Adjustments.empty(2, VOCAB, CPU)
    plain = SamplingBatch.of([SamplingParams()] * 2, [1, 2], CPU, None, table, [0, 1])
    assert plain.adjustments is None
    assert not plain.logprobs
    one = [SamplingParams(), SamplingParams(presence_penalty=1.0)]
    penalised = SamplingBatch.of(one, [1, 2], CPU, None, table, [1, 0])
    assert penalised.adjustments is table
    assert not penalised.logprobs
    assert penalised.select(torch.tensor([1])).slots.tolist() == [0]
    with pytest.raises(AssertionError):
        SamplingBatch.of(one, [1, 2], CPU)
