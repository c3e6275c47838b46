"""The look-up in a request's own text on the GPU, in two kernels.

A program compares one chunk of the text with its last tokens and leaves its best place as one
number: how many tokens match above the position, so that the largest is the longest match, and
among those the latest. The second kernel takes the largest of a request and copies what follows.
Contract: ops.retrieval; twin: reference_retrieval.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096  # positions of a program
MATCHED = tl.constexpr(2**28)  # what a matching token counts; positions are below it


@triton.jit
def _token_at(tokens, pages, positions, inside, page_size):
    page = tl.load(pages + positions // page_size, mask=inside, other=0)
    return tl.load(tokens + page * page_size + positions % page_size, mask=inside, other=-1)


@triton.jit
def _match_kernel(
    tokens, page_table, stride, lengths, best, page_size, chunks,
    LONGEST: tl.constexpr, SHORTEST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """best [B, chunks]: 0 where the chunk holds no match."""
    b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + b).to(tl.int32)
    found = tl.full([], 0, tl.int32)
    if chunk * CHUNK < length:
        pages = page_table + b * stride
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        same = at < length
        score = tl.zeros([CHUNK], tl.int32)
        for back in tl.static_range(LONGEST):
            newest = length - back
            wanted = _token_at(tokens, pages, newest, newest >= 0, page_size)
            inside = same & (at >= back)
            same = inside & (_token_at(tokens, pages, at - back, inside, page_size) == wanted)
            if back + 1 >= SHORTEST:
                score = tl.where(same, at + (back + 1) * MATCHED, score)
        found = tl.max(score, axis=0)
    tl.store(best + b * chunks + chunk, found)


@triton.jit
def _follow_kernel(
    tokens, page_table, stride, lengths, best, out, page_size, chunks, count,
    CHUNKS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """One request."""
    b = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + b).to(tl.int32)
    part = tl.arange(0, CHUNKS)
    score = tl.max(tl.load(best + b * chunks + part, mask=part < chunks, other=0), axis=0)
    place = tl.where(score > 0, score % MATCHED, length - 1)
    step = tl.arange(0, COUNT)
    positions = place + 1 + step % (length - place)
    said = _token_at(tokens, page_table + b * stride, positions, step < count, page_size)
    tl.store(out + b * count + step, said.to(tl.int64), mask=step < count)


def ngram_match(
    tokens: Tensor,
    page_table: Tensor,
    page_size: int,
    lengths: Tensor,
    longest: int,
    shortest: int,
    count: int,
) -> Tensor:
    batch, columns = page_table.shape
    chunks = triton.cdiv(columns * page_size, CHUNK)
    best = torch.empty(batch, chunks, dtype=torch.int32, device=tokens.device)
    out = lengths.new_empty(batch, count)
    text = tokens, page_table, page_table.stride(0), lengths, best
    _match_kernel[(batch, chunks)](*text, page_size, chunks, longest, shortest, CHUNK, num_warps=8)
    _follow_kernel[(batch,)](
        *text, out, page_size, chunks, count, triton.next_power_of_2(chunks),
        triton.next_power_of_2(count), num_warps=1,
    )  # fmt: skip
    return out
