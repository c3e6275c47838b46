"""UnrolledAttention: a draft run on its own predictions, for every row of a packed batch at once.

Row r of step s stands for position r + s and continues the chain that row r began. As in decoding
it sees what the target knew up to the chain's root, and of the drafted tokens only its own chain:

    keys of step 0 at rows <= r          one causal pass, as in ordinary training
    key of step j at row r, j = 1 .. s   s dot products a row, its own the last

    out = sum of both, weighed by exp(lse_part - lse),   lse = log-sum-exp over both

Flash attention recomputes its probabilities from the log-sum-exp it is given, exp(q k - lse), and
takes rowsum(grad * out) from the output it is given. With the merged ones its backward is the exact
share of the causal pass; the share of the dot products is another operation.

Shapes: N rows, H query heads, K key/value heads, G = H / K, D head size.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from aquiline.attention.packed import PackedAttention, flash_serves
from aquiline.kernels import ops


class UnrolledAttention(PackedAttention):
    """The attention of one step; ``after`` it comes the next. The first is PackedAttention's."""

    def __init__(
        self,
        cu_seqlens: Tensor,
        max_seqlen: int,
        earlier: tuple[UnrolledAttention, ...] = (),
    ) -> None:
        super().__init__(cu_seqlens, max_seqlen)
        self.earlier = earlier
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def after(self) -> UnrolledAttention:
        """The attention of the step after this one."""
        return UnrolledAttention(self.cu_seqlens, self.max_seqlen, (*self.earlier, self))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See PackedAttention; this step's keys and values are kept for those after it."""
        self._kept[layer] = (k, v)
        if not self.earlier:
            return super().attend(layer, q, k, v)
        (k0, v0), *chain = [step._kept[layer] for step in (*self.earlier, self)]
        keys, values = zip(*chain, strict=True)
        return chained_attention(q, k0, v0, keys, values, self.cu_seqlens, self.max_seqlen)


def chained_attention(
    q: Tensor,
    k0: Tensor,
    v0: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    cu_seqlens: Tensor,
    max_seqlen: int,
) -> Tensor:
    """q [N, H, D] over k0, v0 [N, K, D] (causal, by document) and over the same row of each of
    ``keys`` and ``values`` [N, K, D]; [N, H, D]."""
    out: Tensor = _Chained.apply(q, k0, v0, cu_seqlens, max_seqlen, *keys, *values)  # type: ignore[no-untyped-call]
    return out


class _Chained(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k0: Tensor, v0: Tensor, cu: Tensor, longest: int, *chain: Tensor
    ) -> Tensor:
        keys, values = chain[: len(chain) // 2], chain[len(chain) // 2 :]
        prefix, prefix_lse, *seeds = _causal(q, k0, v0, cu, longest)
        out, lse = ops.merge_chain(q, prefix, prefix_lse, keys, values)
        ctx.save_for_backward(q, k0, v0, cu, out, lse, *seeds, *chain)
        ctx.longest, ctx.seeds = longest, len(seeds)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k0, v0, cu, out, lse, *rest = ctx.saved_tensors
        seeds, chain = rest[: ctx.seeds], rest[ctx.seeds :]
        keys, values = chain[: len(chain) // 2], chain[len(chain) // 2 :]
        grad = grad.contiguous()
        dq0, dk0, dv0 = _causal_backward(grad, q, k0, v0, out, lse, cu, ctx.longest, seeds)
        dq, dkeys, dvalues = ops.merge_chain_backward(grad, q, out, lse, keys, values, dq0)
        return (dq, dk0, dv0, None, None, *dkeys, *dvalues)


# ---------------------------------------------------------------------------------- the causal pass


def _causal(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> tuple[Tensor, ...]:
    """Output [N, H, D], log-sum-exp [H, N], and what flash wants back in its backward."""
    if flash_serves(q):
        found = torch.ops.aten._flash_attention_forward(
            q, k, v, cu, cu, longest, longest, 0.0, True, False
        )
        return tuple(found[:4])
    outs, sums = [], []
    for start, end in itertools.pairwise(cu.tolist()):
        scores = _scores(q[start:end], k[start:end])
        lse = scores.logsumexp(dim=-1)
        probs = (scores - lse[..., None]).exp()
        outs.append(torch.einsum("kgnm,mkd->nkgd", probs, _wide(v[start:end])).flatten(1, 2))
        sums.append(lse.flatten(0, 1))
    return torch.cat(outs).to(q.dtype), torch.cat(sums, dim=1)


def _causal_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu: Tensor,
    longest: int,
    seeds: list[Tensor],
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v through this pass, ``out`` and ``lse`` being the merged ones."""
    if flash_serves(q):
        found: tuple[Tensor, ...] = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, cu, cu, longest, longest, 0.0, True, *seeds
        )
        return found
    parts, dtype = [], q.dtype
    grad, q, k, v, out = (_wide(x) for x in (grad, q, k, v, out))
    delta = (grad * out).sum(dim=-1).T  # [H, N]
    for start, end in itertools.pairwise(cu.tolist()):
        part = slice(start, end)
        up, queries = _by_head(grad[part], k), _by_head(q[part], k)
        log_sum, mean = (x[:, part].view(k.shape[1], -1, end - start, 1) for x in (lse, delta))
        probs = (_scores(q[part], k[part]) - log_sum).exp()
        slope = torch.einsum("nkgd,mkd->kgnm", up, v[part]) - mean
        slope = probs * slope * q.shape[-1] ** -0.5
        parts.append(
            (
                torch.einsum("kgnm,mkd->nkgd", slope, k[part]).flatten(1, 2),
                torch.einsum("kgnm,nkgd->mkd", slope, queries),
                torch.einsum("kgnm,nkgd->mkd", probs, up),
            )
        )
    return tuple(torch.cat(part).to(dtype) for part in zip(*parts, strict=True))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Causal scores [K, G, n, n] of one document's q [n, H, D] and k [n, K, D]."""
    q, k = _wide(q), _wide(k)
    scores = torch.einsum("nkgd,mkd->kgnm", _by_head(q, k), k) * float(q.shape[-1] ** -0.5)
    hidden = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf)


def _by_head(x: Tensor, key: Tensor) -> Tensor:
    """[N, H, D] -> [N, K, G, D]."""
    return x.view(len(x), key.shape[1], -1, x.shape[-1])


def _wide(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
