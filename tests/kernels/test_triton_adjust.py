"""The kernels of the adjustments in Triton's interpreter against their torch twins."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from aquiline.core.params import SamplingParams
from aquiline.kernels import ops
from aquiline.kernels import reference_adjust as reference
from aquiline.sampling.adjust import Adjustments
from aquiline.speculation.tree import TreeShape

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("triton was imported before the interpreter was chosen", allow_module_level=True)

from aquiline.kernels.triton import adjust as kernels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
CPU = torch.device("cpu")
ENDS = (2, 7, 33)
REQUESTS = {  # a row each; two are equal to nothing asked for
    "nothing": SamplingParams(),
    "logprobs alone": SamplingParams(logprobs=3),
    "repetition": SamplingParams(repetition_penalty=1.7),
    "presence, frequency": SamplingParams(presence_penalty=1.5, frequency_penalty=-0.7),
    "bias": SamplingParams(logit_bias={0: -3.5, 31: 2.0, 32: 100.0, 36: 0.125}),
    "allowed": SamplingParams(allowed_token_ids=(1, 2, 7, 31, 32, 33)),
    "banned": SamplingParams(banned_token_ids=(0, 30, 36), logprobs=0),
    "early": SamplingParams(min_tokens=50, max_tokens=60),
    "late": SamplingParams(min_tokens=4),
    "form": SamplingParams(structured_outputs={"regex": "a"}),
    "form, logprobs": SamplingParams(
        structured_outputs={"regex": "b"}, logprobs=1, logit_bias={1: 2.0}
    ),
    "all": SamplingParams(
        repetition_penalty=0.8, presence_penalty=0.5, frequency_penalty=0.25,
        logit_bias={token: token / 8 for token in range(1, 30)}, banned_token_ids=(3, 34),
        min_tokens=6, logprobs=20,
    ),
}  # fmt: skip
PROMPT, OUTPUT = (5, 5, 31, 32), (1, 4, 4, 31)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def table_of(vocab: int) -> tuple[Adjustments, torch.Tensor]:
    """The rows of REQUESTS, backwards, and the slot of each; then a row without one."""
    table = Adjustments.empty(len(REQUESTS), vocab, CPU)
    slots = torch.tensor([*reversed(range(len(REQUESTS))), -1])
    for slot, params in zip(slots.tolist(), REQUESTS.values(), strict=False):
        table.set(slot, params, PROMPT, OUTPUT, ENDS)
    return table, slots


def logits_of(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]))


def assert_same_adjustment(logits, *args, masks=None, raw=False):
    """Kernel and twin agree, to rounding; returns the adjusted logits, and raw ones if kept."""
    ours, theirs = logits.clone(), logits.clone()
    kept = [torch.zeros_like(logits) if raw else None for _ in range(2)]
    kernels.adjust_logits(ours, *args, masks, kept[0])
    reference.adjust_logits(theirs, *args, masks, kept[1])
    eps = torch.finfo(logits.dtype).eps
    torch.testing.assert_close(ours, theirs, rtol=2 * eps, atol=1e-6)
    if raw:
        assert torch.equal(*kept)
    return theirs, kept[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["chain-3", "tree-8"])
def test_every_node_of_a_tree(monkeypatch, name, dtype):
    monkeypatch.setattr(kernels, "CHUNK", 32)  # two chunks, the last one ragged
    vocab, tree = 37, TreeShape.named(name).tables(CPU)
    table, slots = table_of(vocab)
    rows, nodes = len(slots), tree.shape.size
    logits = logits_of(rows, nodes, vocab).to(dtype)
    tokens = torch.randint(vocab, (rows, nodes), generator=torch.Generator().manual_seed(1))
    tokens[:, 1:3] = 4  # on the path of most nodes, and in the output
    positions = len(PROMPT) + len(OUTPUT) + torch.arange(tree.shape.depth + 1).repeat(rows, 1)
    history = ops.History(tokens, tree.ancestors, None)
    masks = torch.randint(
        -(2**31), 2**31, (rows, nodes, 2), generator=torch.Generator().manual_seed(2)
    ).int()
    masks[:, 2] = 0  # a node that nothing leads to
    adjusted, raw = assert_same_adjustment(
        logits, table, slots, positions, tree.depths, history, None, masks=masks, raw=True
    )
    names = [*REQUESTS, "no slot"]
    touched = {
        name for row, name in enumerate(names) if not torch.equal(adjusted[row], logits[row])
    }
    assert touched == set(names) - {"nothing", "logprobs alone", "late", "no slot"}
    kept = {name for row, name in enumerate(names) if bool(raw[row].any())}
    assert kept == {"banned", "form, logprobs", "all"}
    bits = (masks[..., None] >> torch.arange(32)).flatten(-2)[..., :vocab] & 1
    for name in ("form", "form, logprobs"):
        row = names.index(name)
        assert torch.equal(adjusted[row].isneginf(), bits[row] == 0)
    assert torch.equal(adjusted[names.index("form")][bits[names.index("form")] == 1],
                       logits[names.index("form")][bits[names.index("form")] == 1])  # fmt: skip
    assert torch.equal(raw[names.index("all")], logits[names.index("all")])
    ends = adjusted[names.index("all")][:, ENDS].isneginf()  # 4 said, 6 wanted
    assert torch.equal(ends.all(-1), tree.depths < 2)
    assert torch.equal(ends.any(-1), tree.depths < 2)


def test_expanded_nodes_over_a_reduced_vocabulary():
    vocab, tree = 100, TreeShape.of([[0], [1], [0, 0], [1, 0], [1, 1], [1, 0, 0]]).tables(CPU)
    table, slots = table_of(vocab)
    ids = torch.tensor([0, 1, 2, 4, 5, 30, 31, 32, 33, 34, 36, 64, 99])
    tokens = torch.tensor([[9, 4, 31, 0, 4, 1]]).expand(len(slots), -1)  # of the first two levels
    logits = logits_of(len(slots), 2, 2 * len(ids))[..., : len(ids)]  # a view
    history = ops.History(tokens, tree.ancestors, tree.nodes[[3, 4]])
    masks = torch.full((len(slots), 2, 4), -1, dtype=torch.int32)
    masks[:, 1, 1] = 0  # of tokens 32 to 63
    positions = torch.arange(9, 13).repeat(len(slots), 1)
    levels = torch.tensor([2, 2])
    adjusted, _ = assert_same_adjustment(logits, table, slots, positions, levels, history, ids,
                                          masks=masks)  # fmt: skip
    form = adjusted[list(REQUESTS).index("form")].isneginf()
    assert ids[form[1]].tolist() == [32, 33, 34, 36]
    assert not form[0].any()
    row = list(REQUESTS).index("presence, frequency")
    # The output holds 1 and 31 once and 4 twice; node 3's path adds 4 and 0, node 4's 31 and 4.
    counts = torch.zeros(2, vocab)
    counts[0, [1, 31, 4, 0]] = torch.tensor([1.0, 1, 3, 1])
    counts[1, [1, 31, 4, 0]] = torch.tensor([1.0, 2, 3, 0])
    lowered = 1.5 * (counts > 0) - 0.7 * counts
    torch.testing.assert_close(logits[row] - adjusted[row], lowered[:, ids])


def test_without_history_and_one_row():
    table, slots = table_of(40)
    logits = logits_of(len(slots), 1, 40)
    positions = torch.full((len(slots), 1), 8)
    assert_same_adjustment(logits, table, slots, positions, None, None, None)


def test_a_full_row_of_biases_is_searched_to_its_ends():
    vocab = 3000
    table = Adjustments.empty(1, vocab, CPU)
    bias = {1 + 2 * k: (k % 13) - 6.0 for k in range(1024)}
    table.set(0, SamplingParams(logit_bias=bias), (0,), (), ())
    logits = torch.zeros(1, 1, vocab)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    adjusted, _ = assert_same_adjustment(logits, table, zero[0], zero, None, None, None)
    assert adjusted[0, 0, :2049].tolist() == [bias.get(token, 0.0) for token in range(2049)]


def test_counts():
    vocab = 40
    table, slots = table_of(vocab)
    tokens = torch.randint(5, (len(slots), 4), generator=torch.Generator().manual_seed(2))
    how_many = torch.tensor([1, 2, 3, 4] * 3)[: len(slots)]
    theirs = replace(table, **{f.name: getattr(table, f.name).clone() for f in fields(table)})
    before = table.counts.clone()
    kernels.count_tokens(table, slots, tokens, how_many)
    reference.count_tokens(theirs, slots, tokens, how_many)
    assert torch.equal(table.counts, theirs.counts)
    added = (table.counts - before).sum(-1)
    penalised = [name in ("repetition", "presence, frequency", "all") for name in REQUESTS]
    wanted = [n * on for n, on in zip(how_many.tolist(), penalised, strict=False)]
    assert added[slots[:-1]].tolist() == wanted
    table.counts[:, 3] = ops.MAX_COUNT
    for run in (kernels, reference):
        run.count_tokens(table, slots, torch.full_like(tokens, 3), how_many)
        assert bool((table.counts[:, 3] == ops.MAX_COUNT).all())


@pytest.mark.parametrize("vocab", [7, 50, 700])
def test_log_probabilities(monkeypatch, vocab):
    monkeypatch.setattr(kernels, "TOP_CHUNK", 64)
    generator = torch.Generator().manual_seed(vocab)
    table = Adjustments.empty(3, vocab, CPU)
    table.set(0, SamplingParams(logprobs=0), (1,), (), ())
    table.set(2, SamplingParams(logprobs=5, banned_token_ids=(1,)), (1,), (), ())
    slots, path = torch.tensor([2, 1, 0]), torch.tensor([[0, 3], [0, 1], [0, 2]])
    logits, raw = logits_of(3, 4, vocab), logits_of(3, 4, vocab + 1)[..., :-1].contiguous()
    raw[0, 3, : vocab // 2] = 1.5  # ties go to the lowest id
    chosen = torch.randint(vocab, (3, 2), generator=generator)
    for args in ((raw, table, slots, path), (None, table, slots, path), (None, None, None, None)):
        ours = kernels.token_logprobs(logits, *args, chosen)
        theirs = reference.token_logprobs(logits, *args, chosen)
        wanted = [0, 2] if args[1] is not None else [0, 1, 2]
        torch.testing.assert_close(ours[wanted], theirs[wanted], rtol=1e-5, atol=1e-5)
        assert torch.equal(ours[wanted][..., 22:], theirs[wanted][..., 22:])
    exact = raw[0, 3].log_softmax(-1)
    found = reference.token_logprobs(logits, raw, table, slots, path, chosen)[0, 1]
    assert found[0].item() == pytest.approx(exact[chosen[0, 1]].item())
    assert found[1].item() == 1 + int((exact > exact[chosen[0, 1]]).sum())
    count = min(vocab, 20)
    assert (
        found[22 : 22 + count].tolist()
        == exact.sort(descending=True, stable=True)[1][:count].tolist()
    )
    assert found[22 + count :].tolist() == [-1] * (20 - count)
