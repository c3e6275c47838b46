"""The look-up in a request's own text: by hand, against a search in Python, and the kernels."""

from __future__ import annotations

import pytest
import torch

from aquiline.kernels import ops, reference_retrieval

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("triton was imported before the interpreter was chosen", allow_module_level=True)

from aquiline.kernels.triton import retrieval as kernels  # noqa: E402


def paged(texts, page_size, seed=0):
    """Texts in scattered pages; beyond each, and in page 0, are tokens that must not count."""
    pages = max(map(len, texts)) // page_size + 2
    generator = torch.Generator().manual_seed(seed)
    order = 1 + torch.randperm(len(texts) * pages, generator=generator)
    page_table = order.view(len(texts), pages)
    tokens = torch.randint(3, ((len(order) + 1) * page_size,), generator=generator).int()
    for text, row in zip(texts, page_table, strict=True):
        for position, token in enumerate(text):
            tokens[row[position // page_size] * page_size + position % page_size] = token
    lengths = torch.tensor([len(text) - 1 for text in texts])
    return tokens, page_table, page_size, lengths


def searched(text, longest, shortest, count):
    place = len(text) - 2
    for k in range(longest, shortest - 1, -1):
        ends = [p for p in range(k - 1, len(text) - 1) if text[p - k + 1 : p + 1] == text[-k:]]
        if ends:
            place = ends[-1]
            break
    text = list(text)
    for _ in range(count):
        place += 1
        text.append(text[place])
    return text[len(text) - count :]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1, 2]),  # three tokens
        ([1, 2, 3, 9, 2, 3, 7, 1, 2, 3], [9, 2, 3, 7]),  # three before a later two
        ([2, 3, 9, 2, 3, 7, 1, 2, 3], [7, 1, 2, 3]),  # the latest of two
        ([4, 5, 6, 6, 5], [5, 5, 5, 5]),  # one token is not enough: the newest once more
        ([8, 7, 8, 7, 8, 7], [8, 7, 8, 7]),  # goes on beyond its end
        ([5, 5], [5, 5, 5, 5]),
    ],
)
def test_by_hand(text, found):
    assert ops.ngram_match(*paged([text], 4), 3, 2, 4).tolist() == [found]
    assert searched(text, 3, 2, 4) == found


@pytest.mark.parametrize(("longest", "shortest"), [(3, 2), (3, 1), (2, 2), (1, 1)])
@pytest.mark.parametrize("page_size", [4, 16])
def test_ragged_texts_are_searched_alike(monkeypatch, page_size, longest, shortest):
    monkeypatch.setattr(kernels, "CHUNK", 16)  # matches across chunks and pages
    generator = torch.Generator().manual_seed(longest + page_size)
    sizes = [2, 3, 4, 15, 16, 17, 18, 33, 64, 65, 90]
    texts = [torch.randint(3, (n,), generator=generator).tolist() for n in sizes]
    args = *paged(texts, page_size), longest, shortest, 5
    expected = [searched(text, longest, shortest, 5) for text in texts]
    assert reference_retrieval.ngram_match(*args).tolist() == expected
    assert kernels.ngram_match(*args).tolist() == expected
