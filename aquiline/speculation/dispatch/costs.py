"""CostTable: milliseconds of a round, measured at some points and interpolated between them.

A round costs what it reads and computes: weights once, rows = batch x nodes through them, one
draft pass per depth, and every KV token once. At a given context per request all of that is
affine in the batch, so the axes of the grid are

    batch, context = KV tokens / batch, nodes (root counted), depth

Points that a grid lacks are filled along one axis after the other (batch first: the growth by
batch at a long context holds the price of its KV tokens). Then a running maximum along each axis
takes out noise: a round is never cheaper than one with less of everything. Between points the
table is multilinear, hence monotone along every axis. Below the grid the nearest point counts, so
no cost falls under what was measured. Beyond it each line goes on as in its last cell, up to 64
times the batch and the context. A tree beyond the measured nodes or depth costs infinity: what was
not measured is not chosen.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aquiline.core.errors import AquilineError

Place = tuple[float, float, float, float]  # batch, context, nodes, depth
BATCH, CONTEXT, NODES, DEPTH = range(4)
FAR = 64  # times the largest measured batch and context: where extrapolation ends


@dataclass(frozen=True)
class CostPoint:
    """One measurement. Plain decoding is ``nodes=1, depth=0``.

    Attributes:
        batch: requests.
        nodes: of the tree, the root counted.
        kv_tokens: cached tokens of all requests together.
        ms: of one round.
    """

    batch: int
    nodes: int
    depth: int
    kv_tokens: int
    ms: float

    @property
    def place(self) -> Place:
        return (self.batch, self.kv_tokens / self.batch, self.nodes, self.depth)


class CostTable:
    """Cost of a round anywhere in the measured range; see the module for the interpolation."""

    def __init__(self, points: Sequence[CostPoint]) -> None:
        if not any(point.depth == 0 for point in points):
            raise AquilineError("costs: plain decoding (nodes 1, depth 0) is missing; measure it")
        self.points = tuple(points)
        places = [point.place for point in points]
        self._axes = [sorted({place[axis] for place in places}) for axis in range(4)]
        for axis in (BATCH, CONTEXT):
            self._axes[axis].append(FAR * self._axes[axis][-1])
        grid = {point.place: point.ms for point in points}
        for axis in range(4):
            _fill(grid, axis, self._axes[axis])
        for axis in range(4):
            _running_maximum(grid, axis, self._axes[axis])
        self._grid = grid

    def round_ms(self, batch: int, nodes: int, depth: int, kv_tokens: float) -> float:
        """Milliseconds of a round; monotone in nodes, depth, and KV tokens at a given batch."""
        if nodes > self._axes[NODES][-1] or depth > self._axes[DEPTH][-1]:
            return math.inf
        place = (batch, kv_tokens / batch, nodes, depth)
        ends = [_cell(axis, x) for axis, x in zip(self._axes, place, strict=True)]
        total = 0.0
        for (b, wb), (c, wc), (n, wn), (d, wd) in itertools.product(*ends):
            total += wb * wc * wn * wd * self._grid[b, c, n, d]
        return total


def _cell(axis: Sequence[float], x: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """The neighbours of x on an axis with their weights; at or past an end, the end twice."""
    if x <= axis[0] or x >= axis[-1]:
        end = axis[0] if x <= axis[0] else axis[-1]
        return (end, 1.0), (end, 0.0)
    above = bisect_left(axis, x)
    share = (x - axis[above - 1]) / (axis[above] - axis[above - 1])
    return (axis[above - 1], 1 - share), (axis[above], share)


def _lines(grid: Mapping[Place, float], axis: int) -> dict[Place, dict[float, float]]:
    """The known points of each line along an axis; a line is named by its place at 0."""
    lines: dict[Place, dict[float, float]] = {}
    for place, ms in grid.items():
        lines.setdefault(_at(place, axis, 0.0), {})[place[axis]] = ms
    return lines


def _at(place: Place, axis: int, x: float) -> Place:
    return (*place[:axis], x, *place[axis + 1 :])  # type: ignore[return-value]


def _fill(grid: dict[Place, float], axis: int, coordinates: Sequence[float]) -> None:
    """Give every line that has a point all of its axis' points.

    Between known points linear, below them the first, above them along the last segment (if that
    rises; a single known point is a constant).
    """
    for line, known in _lines(grid, axis).items():
        at = sorted(known)
        for x in coordinates:
            (low, share), (high, rest) = _cell(at, x)
            ms = share * known[low] + rest * known[high]
            if x > at[-1] and len(at) > 1:
                slope = (known[at[-1]] - known[at[-2]]) / (at[-1] - at[-2])
                ms += max(slope, 0.0) * (x - at[-1])
            grid[_at(line, axis, x)] = ms


def _running_maximum(grid: dict[Place, float], axis: int, coordinates: Sequence[float]) -> None:
    for line, known in _lines(grid, axis).items():
        for low, high in itertools.pairwise(coordinates):
            known[high] = grid[_at(line, axis, high)] = max(known[low], known[high])
