"""Packed batches of random documents."""

from __future__ import annotations

import itertools

import torch

from aquiline.training.packing import PackedBatch
from tests.laws.tiny import VOCAB


def packed(lengths: list[int], seed: int = 0, padding: int = 0) -> PackedBatch:
    """Random tokens, about two thirds of them the assistant's."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths) + padding
    mask = torch.rand(count, generator=generator) < 0.67
    mask[count - padding :] = False
    edges = list(itertools.accumulate([0, *lengths, *([padding] if padding else [])]))
    positions = torch.cat([*map(torch.arange, lengths), torch.zeros(padding, dtype=torch.int64)])
    tokens = torch.randint(0, VOCAB, (count,), generator=generator)
    cu = torch.tensor(edges, dtype=torch.int32)
    return PackedBatch(tokens, mask, positions, cu, max(*lengths, padding), 0.0)
