"""Path counts on real text: which nodes of one big static tree the target accepts.

Each round accepts the path from the root to one leaf; every node on it counts once. The counts of
a tree price every subtree of it (see ``speculation.dispatch.paths``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aquiline.core.params import SamplingParams, TreePath, VerificationRule
from aquiline.decoding.loop import decode_prompts
from aquiline.decoding.models import DecoderModels
from aquiline.speculation.dispatch.default import default_tree
from aquiline.speculation.dispatch.paths import PathShares, band_of
from aquiline.speculation.tree import TreeShape

MEASURED_NODES, MEASURED_DEPTH = 63, 7


@dataclass(frozen=True)
class PathCounts:
    """Rounds of one tree.

    Attributes:
        accepted: [N] rounds that accepted each node; the root's are all of them.
    """

    shape: TreeShape
    accepted: tuple[int, ...]

    @property
    def rounds(self) -> int:
        return self.accepted[0]

    @property
    def shares(self) -> dict[TreePath, float]:
        """Path -> share of the rounds that accepted the node."""
        counts = zip(self.shape.paths, self.accepted[1:], strict=True)
        return {path: count / max(self.rounds, 1) for path, count in counts}

    @property
    def tokens_per_call(self) -> float:
        return sum(self.accepted) / max(self.rounds, 1)


def count_paths(shape: TreeShape, leaves: Iterable[int]) -> PathCounts:
    """From the deepest accepted node of every round (0: none)."""
    accepted = [0] * shape.size
    for leaf in leaves:
        accepted[leaf] += 1
    for node in range(shape.size - 1, 0, -1):  # a child's number is above its parent's
        accepted[shape.parents[node]] += accepted[node]
    return PathCounts(shape, tuple(accepted))


def measurement_tree(rule: VerificationRule, temperature: float) -> TreeShape:
    """63 draft nodes within depth 7, the likeliest by the default path probabilities."""
    return default_tree(rule, band_of(temperature), MEASURED_NODES, MEASURED_DEPTH)


def measure_paths(
    models: DecoderModels,
    prompts: Sequence[Sequence[int]],
    shape: TreeShape,
    max_tokens: int,
    end_tokens: frozenset[int],
    params: SamplingParams,
    rule: VerificationRule = "coupled",
    batch: int = 16,
) -> PathShares:
    """Decode the prompts, ``batch`` at a time, and count the accepted nodes of ``shape``."""
    leaves: list[int] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        for one in decode_prompts(models, part, shape, max_tokens, end_tokens, params, rule):
            leaves += one.verdict.path[:, -1].tolist()
    counts = count_paths(shape, leaves)
    return PathShares(rule, band_of(params.temperature), counts.rounds, counts.shares)
