"""Dense layers: norms, products with what surrounds them, rotary positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aquiline.kernels import cpu, reference
from aquiline.kernels.ops.device import fast, on_triton

if torch.cuda.is_available():
    from aquiline.kernels.triton import differentiable, elementwise
    from aquiline.kernels.triton import linear as skinny

SKINNY_ROWS = 64  # rows of x up to which the skinny linear is faster than cuBLAS in a round
SPLIT_ROWS, SPLIT_WEIGHT = 32, 2**24  # rows and elements past which cuBLAS is, see _splits
PackedWeight = cpu.PackedWeight
pack_weight = cpu.pack_weight


class Norm(NamedTuple):
    """An RMS norm: weight [d] and eps."""

    weight: Tensor
    eps: float


class Normed(NamedTuple):
    """A vector x [..., d] that is read through a norm, if there is one.

    Where the kernel that wrote x prepared the norm: for few rows ``scaled`` is x * weight and
    ``squares`` [P, R] are shares of the sum of x^2 of each row, and a linear layer divides its
    result by rms(x); for many, ``ready`` is norm(x).
    """

    x: Tensor
    norm: Norm | None
    scaled: Tensor | None = None
    squares: Tensor | None = None
    ready: Tensor | None = None

    def value(self) -> Tensor:
        """norm(x)."""
        if self.ready is not None:
            return self.ready
        return self.x if self.norm is None else rms_norm(self.x, *self.norm)


def _skinny(x: Tensor) -> bool:
    """Whether x is for the skinny linear: few rows in half precision. In fp32 cuBLAS has IEEE
    products that Triton's tensor-core kernel would have to emulate."""
    return fast(x) and x.dtype != torch.float32 and x.numel() // x.shape[-1] <= SKINNY_ROWS


def _splits(x: Tensor, weight: Tensor) -> bool:
    """Whether this product onto the residual stream is for cuBLAS all the same: its columns alone
    do not fill the card, and with many rows it pays to split K as well."""
    return x.numel() // x.shape[-1] > SPLIT_ROWS and weight.numel() >= SPLIT_WEIGHT


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] / rms(x) * weight [d], the mean square taken in fp32 at least."""
    if fast(x):
        return elementwise.rms_norm(x, weight, eps)
    if on_triton(x):
        return differentiable.rms_norm(x, weight, eps)
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        return cpu.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2i] -> silu(gate) * up [..., i]."""
    if fast(gate_up):
        return elementwise.silu_mul(gate_up)
    if on_triton(gate_up):
        return differentiable.silu_mul(gate_up)
    return reference.silu_mul(gate_up)


def linear(
    x: Tensor | Normed,
    weight: Tensor,
    bias: Tensor | None = None,
    packed: PackedWeight | None = None,
) -> Tensor:
    """x [..., in] times weight [out, in] transposed, plus bias [out]; [..., out].

    ``packed`` is what ``pack_weight(weight)`` returned, or None.
    """
    source = x if isinstance(x, Normed) else Normed(x, None)
    if _skinny(source.x):
        return _skinny_linear(source, weight, bias)
    value = source.value()
    if packed is not None:
        return cpu.packed_linear(value, packed, bias)
    return reference.linear(value, weight, bias)


def gated_linear(x: Tensor | Normed, weight: Tensor, packed: PackedWeight | None = None) -> Tensor:
    """silu(gate) * up [..., i] of [gate, up] = linear(x, weight [2i, in])."""
    source = x if isinstance(x, Normed) else Normed(x, None)
    if _skinny(source.x):
        return _skinny_linear(source, weight, None, gated=True)
    return silu_mul(linear(source, weight, None, packed))


def residual_linear(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    norm: Norm | None,
    packed: PackedWeight | None = None,
) -> Normed:
    """residual [..., out] + linear(x, weight), to be read through ``norm``."""
    if _skinny(x) and not _splits(x, weight):
        scale = None if norm is None else norm.weight
        out = skinny.skinny_linear(x, weight, residual=residual, next_weight=scale)
        return Normed(out[0], norm, out[1], out[2])
    if packed is not None:
        return Normed(cpu.packed_linear(x, packed, None, residual), norm)
    product = reference.linear(x, weight, None)
    if norm is not None and on_triton(x):
        add_norm = elementwise.add_norm if fast(x) else differentiable.add_norm
        total, normed = add_norm(product, residual, *norm)
        return Normed(total, norm, ready=normed)
    return Normed(residual + product, norm)


def _skinny_linear(
    source: Normed, weight: Tensor, bias: Tensor | None, gated: bool = False
) -> Tensor:
    scaled, squares, eps = _prepared(source)
    return skinny.skinny_linear(scaled, weight, bias, squares, eps, gated=gated)[0]


def _prepared(source: Normed) -> tuple[Tensor, Tensor | None, float]:
    """x as the skinny linear reads it: scaled, with its squares and eps; or normed already."""
    if source.scaled is None or source.norm is None:
        return source.value(), None, 0.0
    return source.scaled, source.squares, source.norm.eps


def rotary_linear(
    x: Tensor | Normed,
    weight: Tensor,
    bias: Tensor | None,
    packed: PackedWeight | None,
    cos: Tensor,
    signed_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """``rotary_write`` of the heads linear(x, weight [(H + 2K) * D, in]): the queries."""
    source = x if isinstance(x, Normed) else Normed(x, None)
    size = cos.shape[-1]
    if _skinny(source.x) and skinny.fits_rotary(weight, size):
        scaled, squares, eps = _prepared(source)
        return skinny.skinny_rotary(
            scaled, weight, bias, squares, eps, cos, signed_sin, slots, k_cache, v_cache
        )
    heads = linear(source, weight, bias, packed)
    heads = heads.view(*heads.shape[:-1], -1, size)
    return rotary_write(heads, cos, signed_sin, k_cache, v_cache, slots)


def rotary_write(
    heads: Tensor, cos: Tensor, signed_sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> Tensor:
    """Rotate queries and keys of heads [B, T, H + 2K, D] by cos, signed_sin [B, T, 1, D]; write
    keys and values to the caches [slots, K, D] at slots [B * T]; return the queries [B, T, H, D].

    Slot 0 is a dustbin: several rows may write it.
    """
    if fast(heads):
        return elementwise.rotary_write(heads, cos, signed_sin, k_cache, v_cache, slots)
    return reference.rotary_write(heads, cos, signed_sin, k_cache, v_cache, slots)


def rotary_split(
    heads: Tensor, cos: Tensor, signed_sin: Tensor, kv_heads: int
) -> tuple[Tensor, ...]:
    """Rotate queries and keys of heads [B, T, H + 2K, D] by cos, signed_sin [B, T, 1, D]; queries
    [B * T, H, D], keys and values [B * T, K, D], differentiable in ``heads``.

    ``heads`` is spent: the results may lie in its place, and nothing else may need it, a gradient
    included (what a linear layer returned is such a tensor).
    """
    split = differentiable.rotary_split if on_triton(heads) else reference.rotary_split
    return split(heads, cos, signed_sin, kv_heads)
