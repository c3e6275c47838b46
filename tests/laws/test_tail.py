"""The tail law: rare tokens of a large vocabulary are drawn as often as they should be.

With 128k tokens the winner's noise comes from the last few of 2^32 words, so too few bits, an
inexact logarithm or a uniform that rounds to 1 show here and nowhere else. Noise falls as its word
rises, hence of the tokens with equal logits only the one with the smallest word can win: the fast
test draws that word from its exact law and lets the package's own transform and draw decide; the
slow one computes all 13 billion words.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from aquiline.core.params import SamplingParams
from aquiline.kernels import noise as noise_module
from aquiline.kernels import ops
from aquiline.sampling.batch import SamplingBatch
from aquiline.sampling.draw import draw, position_noise

VOCAB = 128 * 1024
WORDS = 2**32
GAPS = (18.0, 20.0)
EDGES = [0, 1, 2, 2**8, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 129, 2**32 - 2, 2**32 - 1]


# ------------------------------------------------------------------------------------- the words


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """The vectors that Random123 publishes for philox4x32-10."""
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    k0, k1 = (torch.tensor(word) for word in key)
    assert ops.philox((c0, c1, c2, c3), (k0, k1)).tolist() == words


def test_words_are_uniform_down_to_the_tail():
    rows, vocab = 100, VOCAB
    words = _words(torch.arange(rows), vocab)
    for power in range(1, 22):
        share = 2.0**-power
        for count in (int((words < WORDS >> power).sum()),
                      int((words >= WORDS - (WORDS >> power)).sum())):  # fmt: skip
            total = rows * vocab
            assert abs(count - total * share) < 4 * math.sqrt(total * share * (1 - share)), power


def _words(seeds: Tensor, vocab: int) -> Tensor:
    """[B, V], recovered from the public uniforms."""
    zeros = torch.zeros_like(seeds)
    uniforms = ops.uniform_noise(seeds, zeros, zeros[:, None] + 7, vocab, ops.Stream.DRAW)
    return (uniforms.squeeze(1) * WORDS).long()


# ----------------------------------------------------------------------------- word -> noise


def _noise_of(words: Tensor, monkeypatch) -> Tensor:
    """The package's Gumbel noise of given words [B, n]."""
    with monkeypatch.context() as patch:
        patch.setattr(noise_module, "_bits", lambda *_: words[:, None])
        seeds = torch.zeros(len(words), dtype=torch.int64)
        noise = ops.gumbel_noise(seeds, seeds, seeds[:, None], words.shape[1])
    return noise.squeeze(1)


def test_noise_is_finite_exact_and_monotone(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    words = [torch.tensor(EDGES), torch.arange(4096), torch.arange(WORDS - 4096, WORDS)]
    words += [torch.randint(2**power, (2000,), generator=generator) for power in range(8, 33)]
    sorted_words = torch.cat(words).sort().values
    noise = _noise_of(sorted_words[None], monkeypatch)[0]
    assert noise.isfinite().all()
    uniform = (sorted_words.double() + 0.5) / WORDS
    exact = -torch.log(-torch.log1p(-uniform))
    torch.testing.assert_close(noise.double(), exact, rtol=3e-7, atol=3e-7)
    assert (noise.diff() <= 0).all()
    assert noise[:1000].unique().numel() == sorted_words[:1000].unique().numel(), "the tail ties"


def test_uniforms_never_reach_an_end(monkeypatch):
    monkeypatch.setattr(noise_module, "_bits", lambda *_: torch.tensor([[EDGES]]))
    zero = torch.zeros(1, dtype=torch.int64)
    uniforms = ops.uniform_noise(zero, zero, zero[None], len(EDGES), ops.Stream.ACCEPT)
    assert float(uniforms.min()) > 0
    assert float(uniforms.max()) < 1


def test_rejects_a_uniform_that_reaches_one():
    """The naive fp32 transform: the last 128 words round to u = 1 and the noise is infinite."""
    uniform = (torch.tensor(EDGES).to(torch.float32) + 0.5) * 2.0**-32
    assert not (-torch.log(-torch.log1p(-uniform))).isfinite().all()


# ------------------------------------------------------------------------------- the tail law


def _smallest_words(rows: int, seed: int) -> Tensor:
    """[B, 3]: the word of the favourite, then the two smallest of the VOCAB - 1 others."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(rows, 3, generator=generator, dtype=torch.float64)
    first = -torch.expm1(torch.log(u[:, 1]) / (VOCAB - 1))  # the least of VOCAB - 1 uniforms
    second = first - (1 - first) * torch.expm1(torch.log(u[:, 2]) / (VOCAB - 2))
    return (torch.stack((u[:, 0], first, second), dim=1) * WORDS).long()


def _z_of_tail(noise: Tensor, gap: float) -> float:
    """noise [B, 2] of the favourite and of the best of the rest; how far the wins are off."""
    sampling = SamplingBatch.of([SamplingParams()], [0], noise.device)
    logits = torch.tensor([gap, 0.0]).expand_as(noise)
    key = position_noise(sampling, torch.arange(len(noise))[None], 2)
    vars(key)["table"] = noise[None]  # where a cached property keeps its value
    drawn = draw(logits[None], sampling, key)
    wins, rows = int(drawn.sum()), len(noise)
    rest = (VOCAB - 1) * math.exp(-gap)
    share = rest / (1 + rest)
    return (wins - rows * share) / math.sqrt(rows * share * (1 - share))


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("rows", [100_000, 2_000_000])
def test_tail_law(monkeypatch, gap, rows):
    noise = _noise_of(_smallest_words(rows, seed=5)[:, :2], monkeypatch)
    assert abs(_z_of_tail(noise, gap)) < 4


@pytest.mark.parametrize("gap", GAPS)
def test_tail_law_rejects_a_24_bit_uniform(monkeypatch, gap):
    words = _smallest_words(2_000_000, seed=5)[:, :2]
    coarse = (words >> 8 << 8) + 127  # r / 2^24 plus half a step
    assert abs(_z_of_tail(_noise_of(coarse, monkeypatch), gap)) > 6


def test_flat_logits_hardly_ever_tie_for_the_winner(monkeypatch):
    words = _smallest_words(100_000, seed=6)[:, 1:]

    def ties(words: Tensor) -> int:
        noise = _noise_of(words, monkeypatch)
        return int((noise[:, 0] == noise[:, 1]).sum())

    assert ties(words) < 25, "expected about 3"
    assert ties((words >> 8 << 8) + 127) > 250, "24-bit uniforms would tie in 0.4 % of draws"


def test_the_smallest_word_wins_in_the_real_draw():
    """What the fast tail law rests on, with all the noise computed."""
    rows = 24
    seeds = torch.arange(100, 100 + rows)
    sampling = SamplingBatch.of([SamplingParams()] * rows, seeds.tolist(), torch.device("cpu"))
    noise = position_noise(sampling, torch.full((rows, 1), 7), VOCAB)
    assert noise is not None
    logits = torch.zeros(rows, 1, VOCAB)
    assert (
        draw(logits, sampling, noise).squeeze(1).tolist()
        == _words(seeds, VOCAB).argmin(-1).tolist()
    )


@pytest.mark.slow
def test_tail_law_in_full(monkeypatch):
    """100k draws from 128k tokens, every word computed."""
    rows = 100_000
    smallest = _SmallestWords(VOCAB)
    pairs = torch.tensor([smallest(seed) for seed in range(rows)])
    package = _words(torch.arange(3), VOCAB)
    assert pairs[:3].tolist() == [[int(row[0]), int(row[1:].min())] for row in package]
    noise = _noise_of(pairs, monkeypatch)
    for gap in GAPS:
        assert abs(_z_of_tail(noise, gap)) < 4


class _SmallestWords:
    """Philox in place, four times as fast as the package's: the words that can win a draw."""

    def __init__(self, vocab: int) -> None:
        self.blocks = np.arange(vocab // 4, dtype=np.uint64).reshape(-1, 2048)
        self.words = np.empty((4, 2048), np.uint64)
        self.high = np.empty((2, 2048), np.uint64)

    def __call__(self, seed: int) -> tuple[int, int]:
        """Token 0's word and the smallest of all others."""
        head, rest = 0, WORDS
        for index, counters in enumerate(self.blocks):
            words = self._block(counters, seed)
            if index == 0:
                head, words[0, 0] = int(words[0, 0]), WORDS - 1
            rest = min(rest, int(words.min()))
        return head, rest

    def _block(self, counters: np.ndarray, seed: int) -> np.ndarray:
        c0, c1, c2, c3 = self.words
        high0, high1 = self.high
        c0[:], c1[:], c2[:], c3[:] = counters, 7, 0, 0
        k0, k1 = seed & 0xFFFFFFFF, seed >> 32
        mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
        for _ in range(10):
            np.multiply(c0, np.uint64(0xD2511F53), out=high0)
            np.multiply(c2, np.uint64(0xCD9E8D57), out=high1)
            np.bitwise_and(high0, mask, out=c0)
            np.bitwise_and(high1, mask, out=c2)
            high0 >>= shift
            high1 >>= shift
            high1 ^= np.uint64(k0)
            high0 ^= np.uint64(k1)
            c1 ^= high1
            c3 ^= high0
            c0, c1, c2, c3 = c1, c2, c3, c0  # each word stays where it lies
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
        return self.words[[2, 3, 0, 1]]  # ten rotations of four
