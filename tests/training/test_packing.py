"""Every training document once an epoch, in whole; batches depend on the step alone."""

import itertools

import numpy as np
import pytest
import torch

from aquiline.core.errors import DataError
from aquiline.training.corpus import Corpus, build_corpus
from aquiline.training.packing import Packer
from tests.training.chat_tokenizers import CHATML, ChatTokenizer

N = 128


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    tokenizer = ChatTokenizer(CHATML)
    conversations = [
        [
            {"role": "user", "content": f"{i} The end. " * (i % 3 + 1)},
            {"role": "assistant", "content": f"{i} assistant\n" * (i % 4 + 1)},
        ]
        for i in range(90)
    ]
    folder = tmp_path_factory.mktemp("corpus") / "c"
    build_corpus(tokenizer, conversations, folder, N)
    return Corpus.open(folder)


def documents(batch, corpus):
    """Indices of a batch's documents, found by content; checks each one's fields."""
    by_content = {tuple(corpus.document(i)[0].tolist()): i for i in range(len(corpus))}
    assert len(by_content) == len(corpus)
    found = []
    starts = batch.cu_seqlens.tolist()
    for start, end in itertools.pairwise(starts):
        index = by_content.get(tuple(batch.tokens[start:end].tolist()))
        if index is None:
            assert end == N
            assert not batch.tokens[start:end].any()
            assert not batch.loss_mask[start:end].any()
            assert not batch.positions[start:end].any()
        else:
            found.append(index)
            assert batch.positions[start:end].tolist() == list(range(end - start))
            np.testing.assert_array_equal(batch.loss_mask[start:end], corpus.document(index)[1])
    assert (starts[0], starts[-1]) == (0, N)
    assert batch.max_seqlen == max(end - start for start, end in itertools.pairwise(starts))
    return found


def epoch_batches(packer, epoch):
    batches = (packer.batch(step) for step in itertools.count())
    after = itertools.dropwhile(lambda batch: batch.epoch < epoch, batches)
    return list(itertools.takewhile(lambda batch: batch.epoch < epoch + 1, after))


@pytest.mark.parametrize("epoch", [0, 2])
def test_every_document_once_an_epoch_and_none_held_out(corpus, epoch):
    packer = Packer(corpus, N, seed=3, holdout=10)
    seen = [i for batch in epoch_batches(packer, epoch) for i in documents(batch, corpus)]
    assert len(packer.held_out()) == 10
    assert sorted(seen + packer.held_out()) == list(range(len(corpus)))


def test_dtypes_and_shapes(corpus):
    batch = Packer(corpus, N, seed=3, holdout=10).batch(0)
    assert (batch.tokens.dtype, batch.positions.dtype) == (torch.int64, torch.int64)
    assert (batch.loss_mask.dtype, batch.cu_seqlens.dtype) == (torch.bool, torch.int32)
    assert batch.tokens.shape == batch.loss_mask.shape == batch.positions.shape == (N,)


def test_batch_depends_on_the_step_alone(corpus):
    steps = range(150)
    forward = Packer(corpus, N, seed=3, holdout=10)
    expected = [forward.batch(step) for step in steps]
    resumed = Packer(corpus, N, seed=3, holdout=10)
    for step in reversed(steps):
        batch = resumed.batch(step)
        assert torch.equal(batch.tokens, expected[step].tokens)
        assert batch.epoch == expected[step].epoch
    assert expected[-1].epoch > 2


def test_ranks_share_out_the_sequence_of_one(corpus):
    packer = Packer(corpus, N, seed=3, holdout=10)
    for step, rank in itertools.product(range(20), range(3)):
        batch = packer.batch(step, rank, world=3)
        assert torch.equal(batch.tokens, packer.batch(3 * step + rank).tokens)


def test_seed_and_epoch_change_the_order_but_not_the_holdout(corpus):
    one, two = (Packer(corpus, N, seed=seed, holdout=10) for seed in (1, 2))
    assert not torch.equal(one.batch(0).tokens, two.batch(0).tokens)
    second = epoch_batches(one, 1)[0]
    assert not torch.equal(one.batch(0).tokens, second.tokens)
    assert one.held_out() == two.held_out()
    assert set(one.held_out()) < set(Packer(corpus, N, seed=1, holdout=20).held_out())


def test_epoch_counts_up(corpus):
    packer = Packer(corpus, N, seed=3, holdout=10)
    epochs = [packer.batch(step).epoch for step in range(100)]
    assert epochs[0] == 0
    assert epochs == sorted(set(epochs))


def test_little_is_padded(corpus):
    packer = Packer(corpus, N, seed=3, holdout=10)
    used = sum(corpus.lengths[i] for b in epoch_batches(packer, 0) for i in documents(b, corpus))
    assert used / (N * len(epoch_batches(packer, 0))) > 0.75


def test_held_out_prompts_end_where_the_assistant_begins(corpus):
    packer = Packer(corpus, N, seed=3, holdout=10)
    prompts = packer.held_out_prompts(100, max_prompt=N)
    assert len(prompts) == 10
    tokenizer = ChatTokenizer(CHATML)
    for index, prompt in zip(packer.held_out(), prompts, strict=True):
        ids, mask = corpus.document(index)
        assert prompt == ids[: len(prompt)].tolist()
        assert mask[len(prompt)]
        assert tokenizer.decode(prompt, skip_special_tokens=False).endswith(
            "<|im_start|>assistant\n"
        )
    limit = sorted(map(len, prompts))[4]
    short = [prompt for prompt in prompts if len(prompt) <= limit]
    assert packer.held_out_prompts(100, limit) == short
    assert packer.held_out_prompts(2, limit) == short[:2]


def test_what_cannot_work_is_refused(corpus):
    with pytest.raises(DataError, match="tokens_per_batch"):
        Packer(corpus, int(corpus.lengths.max()) - 1, seed=0, holdout=0)
    with pytest.raises(DataError, match="holdout"):
        Packer(corpus, N, seed=0, holdout=len(corpus))
