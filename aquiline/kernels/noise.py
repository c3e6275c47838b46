"""Noise: random numbers that are a pure function of what they are for.

A counter-based hash (Philox) turns (seed, choice, position, token id, stream) into 32 bits,
the same on every device. This is the plain-torch definition; see ops for the contracts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Stream(IntEnum):
    """What a random number is for. Streams of one (seed, choice, position) are independent."""

    DRAW = 0  # the coupled draw, shared with the draft by design
    PROPOSE = 1
    ACCEPT = 2
    RESIDUAL = 3


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Philox 4x32-10 (Salmon et al., SC 2011): four 32-bit words, stacked in a new last axis.

    Words are int64 tensors holding values below 2^32; counters and keys broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    words: Tensor = torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)  # type: ignore[no-untyped-call]
    return words


def _bits(seeds: Tensor, choices: Tensor, positions: Tensor, count: int, stream: Stream) -> Tensor:
    """32-bit words [B, P, count] keyed by seeds [B], choices [B], positions [B, P], index."""
    blocks = torch.arange(-(-count // 4), device=seeds.device)
    seeds, choices = seeds[:, None, None], choices[:, None, None]
    counter = (
        blocks,
        positions[:, :, None] & _MASK32,
        choices & _MASK32,
        torch.full((), int(stream), device=seeds.device),
    )
    words = philox(counter, (seeds & _MASK32, (seeds >> 32) & _MASK32))
    return words.flatten(-2)[..., :count]


def uniform_noise(
    seeds: Tensor, choices: Tensor, positions: Tensor, count: int, stream: Stream
) -> Tensor:
    """Uniforms [B, P, count] in (0, 1), fp64 so that 32 bits never round to 1."""
    bits = _bits(seeds, choices, positions, count, stream)
    return (bits.double() + 0.5) * 2.0**-32


def gumbel_noise(
    seeds: Tensor, choices: Tensor, positions: Tensor, vocab: int, stream: Stream = Stream.DRAW
) -> Tensor:
    """Gumbel noise -log(-log1p(-u)) [B, P, vocab], fp32, always finite.

    A pure function of (seed, choice, position, token id, stream). u = (r + 0.5) / 2^32 from 32
    bits r. ``-log1p(-u)`` is taken in fp32 where u is small (fp32 resolves it there) and from
    1 - u, exact in integers, where u is large.
    """
    bits = _bits(seeds, choices, positions, vocab, stream)
    low = (bits.to(torch.float32) + 0.5) * 2.0**-32
    high = ((_MASK32 - bits).to(torch.float32) + 0.5) * 2.0**-32  # 1 - u
    exponential = torch.where(bits < 2**31, -torch.log1p(-low), -torch.log(high))
    return -torch.log(exponential)


@dataclass(frozen=True, eq=False)
class NoiseKey:
    """Names the noise of a round without computing it: Triton kernels read the raw fields.

    Attributes:
        seeds, choices: [B] int64.
        positions: [B, P] int64 absolute positions.
        stream: what the noise is for.
        vocab: tokens that it covers.
    """

    seeds: Tensor
    choices: Tensor
    positions: Tensor
    stream: Stream
    vocab: int

    @cached_property
    def table(self) -> Tensor:
        """All of it as Gumbel noise [B, P, vocab], for the torch twins: computed once a round."""
        return gumbel_noise(self.seeds, self.choices, self.positions, self.vocab, self.stream)

    def uniforms(self, count: int) -> Tensor:
        """``count`` uniforms at every position, [B, P, count]."""
        return uniform_noise(self.seeds, self.choices, self.positions, count, self.stream)
