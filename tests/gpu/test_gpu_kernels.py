"""The Triton kernels on the card: against float64, at most twice the error of torch in bf16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aquiline.core.params import SamplingParams
from aquiline.kernels import (
    ops,
    reference,
    reference_adjust,
    reference_retrieval,
    reference_sampling,
)
from aquiline.kernels.noise import NoiseKey, Stream
from aquiline.sampling.adjust import Adjustments
from aquiline.speculation.tree import TreeShape

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
EPS = 1e-5


@pytest.fixture(autouse=True)
def _on_the_card():
    torch.manual_seed(0)
    with torch.device("cuda"), torch.inference_mode():
        yield


def check(got: Tensor, definition: Callable[[torch.dtype], Tensor]) -> None:
    """``definition`` computes the same in a dtype."""
    real = definition(torch.float64)
    error = (definition(got.dtype).double() - real).norm()
    assert (got.double() - real).norm() <= 2 * error + 1e-6 * real.norm()


SHAPES = [(1, 6144, 4096), (4, 4096, 4096), (16, 28672, 4096), (33, 4096, 14336), (64, 960, 576),
          (5, 49152, 576), (8, 576, 1536), (3, 100, 64)]  # fmt: skip


@pytest.mark.parametrize(("rows", "columns", "width"), SHAPES)
def test_linear_through_a_norm_and_onto_a_residual(rows, columns, width):
    stream, delta = torch.randn(1, rows, width, dtype=BF16), torch.randn(1, rows, 64, dtype=BF16)
    small = torch.randn(width, 64, dtype=BF16) / 8
    norm = ops.Norm(1 + torch.randn(width, dtype=BF16) / 4, EPS)
    weight = torch.randn(columns, width, dtype=BF16) * width**-0.5
    source = ops.residual_linear(delta, small, stream, norm)
    assert source.scaled is not None
    x = source.x

    def normed(to: torch.dtype) -> Tensor:
        return F.rms_norm(x.to(to), (width,), norm.weight.to(to), EPS)

    check(x, lambda to: stream.to(to) + F.linear(delta.to(to), small.to(to)))
    check(ops.linear(source, weight), lambda to: F.linear(normed(to), weight.to(to)))
    if columns % 2 == 0:
        check(
            ops.gated_linear(source, weight),
            lambda to: reference.silu_mul(F.linear(normed(to), weight.to(to))),
        )


@pytest.mark.parametrize(("columns", "width"), [(4096, 4096), (28672, 4096), (960, 576)])
def test_rows_do_not_change_a_result(columns, width):
    x = torch.randn(1, 64, width, dtype=BF16)
    weight = torch.randn(columns, width, dtype=BF16) * width**-0.5
    whole = ops.linear(x, weight)
    for rows in (1, 3, 16, 17, 40):
        assert torch.equal(ops.linear(x[:, :rows].contiguous(), weight), whole[:, :rows])


CASES = [(1, 4, 32, 8, 128, 3000, "tree"), (3, 33, 32, 8, 128, 700, "tree"),
         (2, 64, 9, 3, 64, 300, "tree"), (5, 1, 9, 3, 64, 1000, "causal"),
         (2, 300, 9, 3, 64, 200, "causal"), (1, 700, 32, 8, 128, 0, "causal"),
         (4, 1, 32, 8, 128, 500, "none")]  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize(("batch", "rows", "heads", "kv", "size", "context", "kind"), CASES)
def test_attention(batch, rows, heads, kv, size, context, kind, dtype):
    page, columns = 128, (context + rows) // 128 + 2
    page_table = 1 + torch.randperm(batch * columns).view(batch, columns)
    lengths = torch.randint(context // 2, context + 1, (batch,))
    q = torch.randn(batch, rows, heads, size, dtype=dtype)
    k, v = torch.randn(2, (1 + batch * columns) * page, kv, size, dtype=dtype)
    mask = None
    if kind == "tree":
        mask = (torch.rand(rows, rows) < 0.4) | torch.eye(rows, dtype=torch.bool)
    where = page_table, page, lengths, 0 if kind == "none" else rows, mask
    got = ops.tree_attention(q, k, v, *where)
    check(
        got,
        lambda to: (
            reference.tree_attention(q.to(to), k.to(to), v.to(to), *where)
            if to == torch.float64
            else reference.tree_attention(q.double(), k.double(), v.double(), *where).to(to)
        ),
    )


@pytest.mark.parametrize("vocab", [1000, 32000, 128256])
def test_draws_are_those_of_the_twin(vocab):
    """Same noise, same filters, same tokens, on fp32 logits without near ties."""
    rows, nodes = 6, 4
    logits = 3 * torch.randn(rows, nodes, vocab)
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.0, 1.3, 0.5])
    top_k = torch.tensor([0, 0, 40, 0, 5, 0])
    top_p = torch.tensor([1.0, 1.0, 1.0, 0.9, 0.8, 1.0])
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.1])
    seeds, choices = torch.arange(rows) * 2**40 + 7, torch.zeros(rows, dtype=torch.int64)
    positions = torch.arange(rows * 3).view(rows, 3)
    levels = torch.tensor([0, 1, 1, 2])
    arguments = logits, temperature, top_k, top_p, min_p
    floor = ops.score_floor(*arguments)
    twin = reference_sampling.score_floor(*arguments)
    scores = reference_sampling.scaled_scores(logits, temperature)
    kept, expected = (scores >= limit[..., None] for limit in (floor, twin))
    assert (kept == expected).all(-1).float().mean() > 0.9  # a mass may round across top_p
    assert (kept != expected).sum(-1).max() <= 1
    key = NoiseKey(seeds, choices, positions, Stream.DRAW, vocab)
    for count in (1, 4):
        got = ops.draw_top(logits, twin, temperature, key, levels, None, count)
        expected = reference_sampling.draw_top(logits, twin, temperature, key, levels, None, count)
        chosen = scores.gather(-1, expected) >= twin[..., None]  # past the kept ones: any token
        assert (got == expected)[chosen].float().mean() > 0.99


ADJUSTED = (
    SamplingParams(),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.25),
    SamplingParams(logit_bias={126 * k: k / 64 - 8 for k in range(1018)}, logprobs=20),
    SamplingParams(allowed_token_ids=tuple(range(0, 128256, 3)), min_tokens=9),
    SamplingParams(logprobs=0),
    SamplingParams(
        presence_penalty=1.0, logit_bias={5: 3.0}, banned_token_ids=(9, 128255), logprobs=1
    ),
    SamplingParams(structured_outputs={"regex": "a"}, logprobs=2),
)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_adjustments_and_log_probabilities(dtype):
    """A whole tree over a large vocabulary: the same as the twins, which run on the card too."""
    vocab, rows = 128256, len(ADJUSTED)
    card = torch.device("cuda")
    tree = TreeShape.named("eagle-25").tables(card)
    table = Adjustments.empty(rows, vocab, card)
    with torch.device("cpu"):  # rows are made on the host
        for row, params in enumerate(ADJUSTED):
            table.set(row, params, range(0, 128256, 7), [3, 3, 9, 128255] * 5, (2, 128001))
    slots = torch.tensor([6, 5, 4, 3, 2, 1, 0, -1])
    logits = 3 * torch.randn(rows + 1, tree.shape.size, vocab).to(dtype)
    tokens = torch.randint(20, (rows + 1, tree.shape.size))
    positions = 18323 + 8 + torch.arange(tree.shape.depth + 1).repeat(rows + 1, 1)
    history = ops.History(tokens, tree.ancestors, None)
    masks = torch.randint(-(2**31), 2**31, (rows + 1, tree.shape.size, vocab // 32)).int()
    results = []
    for run in (ops, reference_adjust):
        adjusted, raw = logits.clone(), torch.zeros_like(logits)
        run.adjust_logits(adjusted, table, slots, positions, tree.depths, history, None, masks, raw)
        scores = run.token_logprobs(adjusted, raw, table, slots, tree.routes[-1:].expand(8, -1),
                                    tokens[:, : tree.shape.depth + 1])  # fmt: skip
        results.append((adjusted, raw, scores[[0, 1, 2, 4]]))
    (ours, raw, scores), (theirs, exact_raw, exact_scores) = results
    assert torch.equal(raw, exact_raw)
    assert torch.equal(ours.isneginf(), theirs.isneginf())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=2 * eps, atol=1e-6)
    torch.testing.assert_close(scores[..., :22], exact_scores[..., :22], rtol=1e-5, atol=1e-4)
    assert torch.equal(scores[..., 22:], exact_scores[..., 22:])


def test_counts_of_a_round():
    vocab, card = 128256, torch.device("cuda")
    table = Adjustments.empty(2, vocab, card)
    with torch.device("cpu"):
        table.set(1, ADJUSTED[1], (), (7, 7), ())
    tokens = torch.tensor([[7, 7, 3, 7, 5]] * 3)
    ops.count_tokens(table, torch.tensor([1, 0, -1]), tokens, torch.tensor([4, 5, 5]))
    assert table.counts[1, [3, 5, 7]].tolist() == [1, 0, 5]
    assert int(table.counts[0].sum()) == 0


@pytest.mark.parametrize(("length", "page_size"), [(7, 16), (4096, 128), (4097, 128), (20000, 128)])
def test_the_look_up_in_a_text_is_the_twins(length, page_size):
    """Texts of few different tokens, in scattered pages; one of them is short."""
    pages = length // page_size + 2
    page_table = 1 + torch.randperm(3 * pages).view(3, pages)
    tokens = torch.randint(40, ((3 * pages + 1) * page_size,), dtype=torch.int32)
    lengths = torch.tensor([length, length // 2, 3])
    args = tokens, page_table, page_size, lengths, 3, 2, 6
    assert torch.equal(ops.ngram_match(*args), reference_retrieval.ngram_match(*args))
