"""DispatchTable: what `aquiline tune` measured, as one JSON file.

    {"format": 1, "device": "...", "model": "...", "draft": "...", "dtype": "...", "date": "...",
     "versions": {"torch": "..."},
     "paths": [{"rule": "coupled", "band": "greedy", "rounds": 900, "shares": [[[0], 0.7], ...]}],
     "costs": [{"batch": 1, "nodes": 4, "depth": 3, "kv_tokens": 1024, "ms": 6.5}, ...],
     "trees": [[[0], [0, 0]], [], ...]}

Shares are as counted; a tree is its paths, plain decoding the empty list.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from aquiline.core.errors import AquilineError
from aquiline.core.params import TreePath, VerificationRule
from aquiline.speculation.dispatch.costs import CostPoint, CostTable
from aquiline.speculation.dispatch.dispatcher import BATCH_BUCKETS, PLAIN, Dispatcher
from aquiline.speculation.dispatch.paths import BANDS, PathShares, PathTable
from aquiline.speculation.tree import TreeShape

FORMAT = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Provenance:
    """Where and of what a table was measured. ``date`` is ISO 8601."""

    device: str
    model: str
    draft: str
    dtype: str
    versions: Mapping[str, str]
    date: str


@dataclass(frozen=True)
class DispatchTable:
    """Paths, costs and the trees to choose from."""

    provenance: Provenance
    paths: PathTable
    costs: CostTable
    trees: tuple[TreeShape, ...]

    def dispatcher(
        self, rule: VerificationRule = "coupled", batch_buckets: Sequence[int] = BATCH_BUCKETS
    ) -> Dispatcher:
        """A chooser among the table's trees."""
        return Dispatcher(self.trees, self.paths, self.costs, rule, batch_buckets)

    def save(self, path: Path | str) -> None:
        """Write the file, whole or not at all."""
        data = {
            "format": FORMAT, **asdict(self.provenance),
            "paths": [
                asdict(one) | {"shares": [[list(p), share] for p, share in one.shares.items()]}
                for one in self.paths.measured
            ],
            "costs": [asdict(point) for point in self.costs.points],
            "trees": [[list(p) for p in tree.paths] for tree in self.trees],
        }  # fmt: skip
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(data) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise AquilineError(f"dispatch table {path}: {error}; give a writable file") from None

    @classmethod
    def load(cls, path: Path | str) -> DispatchTable:
        """Read and check a file; AquilineError names the file, the field and the remedy."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AquilineError(
                f"dispatch table {path}: {error}; give a file that aquiline tune wrote"
            ) from None
        reader = _Reader(str(path))
        reader.require(isinstance(data, dict), "the file", "a JSON object")
        found = data.get("format")
        reader.require(found == FORMAT, "format", f"{FORMAT}, not {found!r}")
        names = ("device", "model", "draft", "dtype", "date")
        for name in names:
            reader.require(isinstance(data.get(name), str), name, "a string")
        reader.require(isinstance(data.get("versions"), dict), "versions", "an object")
        origin = Provenance(**{name: data[name] for name in names}, versions=data["versions"])
        paths = PathTable(tuple(reader.each(data, "paths", reader.shares)))
        costs = tuple(reader.each(data, "costs", reader.cost))
        plain = any((point.nodes, point.depth) == (1, 0) for point in costs)
        reader.require(plain, "costs", "a list that holds plain decoding (nodes 1, depth 0)")
        trees = tuple(reader.each(data, "trees", reader.tree))
        timed = {(point.nodes, point.depth) for point in costs}
        for index, tree in enumerate(trees):
            ok = (tree.size, tree.depth) in timed
            reader.require(ok, f"trees[{index}]", "one whose nodes and depth are among the costs")
        return cls(origin, paths, CostTable(costs), trees)


class _Reader:
    """Checks the fields of one file; the first bad one is named."""

    def __init__(self, file: str) -> None:
        self.file = file

    def require(self, ok: bool, field: str, expected: str) -> None:
        if not ok:
            raise AquilineError(
                f"dispatch table {self.file}: {field} must be {expected}; run aquiline tune again"
            )

    def each(self, data: Mapping[str, Any], name: str, parse: Callable[[str, Any], T]) -> list[T]:
        """The parsed items of a list that may not be empty."""
        items = data.get(name)
        self.require(isinstance(items, list) and bool(items), name, "a list that is not empty")
        return [parse(f"{name}[{index}]", item) for index, item in enumerate(data[name])]

    def shares(self, field: str, item: Any) -> PathShares:
        self.require(isinstance(item, dict), field, "an object")
        rules = get_args(VerificationRule)
        self.require(item.get("rule") in rules, f"{field}.rule", f"one of {rules}")
        self.require(item.get("band") in BANDS, f"{field}.band", f"one of {BANDS}")
        self.require(_count(item.get("rounds"), 0), f"{field}.rounds", "a count")
        pairs = item.get("shares")
        ok = isinstance(pairs, list) and all(
            isinstance(pair, list) and len(pair) == 2 and _is_path(pair[0]) and _share(pair[1])
            for pair in pairs
        )
        self.require(ok, f"{field}.shares", "pairs [path, share from 0 to 1]")
        shares: dict[TreePath, float] = {tuple(path): share for path, share in item["shares"]}
        self.tree(f"{field}.shares", [path for path, _ in item["shares"]])  # closed, no path twice
        return PathShares(item["rule"], item["band"], item["rounds"], shares)

    def cost(self, field: str, item: Any) -> CostPoint:
        self.require(isinstance(item, dict), field, "an object")
        for name, least in (("batch", 1), ("nodes", 1), ("depth", 0), ("kv_tokens", 0)):
            ok = _count(item.get(name), least)
            self.require(ok, f"{field}.{name}", f"an integer from {least}")
        ms = item.get("ms")
        ok = _number(ms) and 0 < ms < math.inf
        self.require(ok, f"{field}.ms", "a positive number")
        ok = item["depth"] < item["nodes"]
        self.require(ok, f"{field}.depth", "less than nodes, which count the root")
        return CostPoint(*(item[name] for name in ("batch", "nodes", "depth", "kv_tokens", "ms")))

    def tree(self, field: str, item: Any) -> TreeShape:
        ok = isinstance(item, list) and all(map(_is_path, item))
        self.require(ok, field, "a list of paths of child ranks")
        if not item:
            return PLAIN
        try:
            return TreeShape.of(item)
        except AquilineError as error:
            raise AquilineError(
                f"dispatch table {self.file}: {field}: {error}, or run aquiline tune again"
            ) from None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_path(value: Any) -> bool:
    return isinstance(value, list) and all(_count(rank, 0) for rank in value)


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1
