"""One self-contained HTML page of stored results: what was run, plots as inline SVG, the figures.

A result is a JSON object with ``rows``. Which plots it gets follows from the fields of its rows:

    batch or concurrency, ttit_ms     TTIT and throughput against it, a line for each tree
    accepted_by_depth                 acceptance by depth
    round_ms, limit_ms                a round against its limit
    each (of bench serve)             TTIT and TTFT over the time of arrival
    tree, or trees at the top         the trees as pictures
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aquiline.core.errors import AquilineError
from aquiline.speculation.tree import TreeShape

Row = Mapping[str, Any]
LOADS = ("concurrency", "batch")
CURVES = (("ttit_ms", "TTIT, ms a token"), ("tokens_per_second", "tokens a second"))
OF_THE_ROWS = ("rows", "trees", "paths", "costs")  # not told of in the head of a section
MAX_PICTURES, MAX_PICTURED, MAX_ROWS = 9, 64, 200
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2024; background: #fff }
h2 { border-top: 1px solid #d8dde3; padding-top: 1.2rem; margin-top: 2.2rem }
svg { max-width: 100%; height: auto }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem }
dt { color: #60686f } dd { margin: 0; overflow-wrap: anywhere }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { text-align: right; padding: .15rem .6rem; border-bottom: 1px solid #e8ebee }
th { color: #60686f; font-weight: 600 } div.wide { overflow-x: auto }
"""


def load_results(paths: Sequence[Path]) -> dict[str, Row]:
    """By file name, and by section where a file is an object of results; AquilineError names the
    file that is no result."""
    results: dict[str, Row] = {}
    for path in paths:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AquilineError(f"{path}: {error}; give a stored result") from None
        for part, one in _parts(result):
            if not isinstance(one, dict):
                raise AquilineError(f"{path}: not a JSON object; give a stored result")
            names = [f"{file}, {part}" if part else str(file) for file in (path.name, path)]
            results[names[names[0] in results]] = one
    return results


def _parts(result: Any) -> Iterable[tuple[str, Any]]:
    """The results in a file, each with what tells it from the others."""
    if isinstance(result, list):
        return [(str(number), one) for number, one in enumerate(result, 1)]
    values = result.values() if isinstance(result, dict) else ()
    if values and all(isinstance(one, dict) and "command" in one for one in values):
        return list(result.items())
    return [("", result)]


def page(results: Mapping[str, Row], title: str = "aquiline: results") -> str:
    """The whole HTML document."""
    links = "".join(
        f'<li><a href="#r{number}">{html.escape(name)}</a></li>'
        for number, name in enumerate(results)
    )
    sections = "".join(
        _section(f"r{number}", name, result)
        for number, (name, result) in enumerate(results.items())
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1><ul>{links}</ul>{sections}</body></html>\n"
    )


def _section(anchor: str, name: str, result: Row) -> str:
    rows = [_flat(row) for row in result.get("rows", ()) if isinstance(row, dict)]
    facts = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(_text(value))}</dd>"
        for key, value in result.items()
        if key not in OF_THE_ROWS and not _is_rows(value)
    )
    plots = "".join(
        _svg(draw, f"{anchor}-{draw.__name__}", data)
        for draw, data in (
            (_curves, [row for row in rows if _load(row) and "ttit_ms" in row]),
            (_depths, [row for row in rows if row.get("accepted_by_depth")]),
            (_rounds, [row for row in rows if {"round_ms", "limit_ms"} <= row.keys()]),
            (_replays, [row for row in rows if row.get("each")]),
            (_pictures, list(_trees(result, rows))),
        )
        if data
    )
    body = f'<section id="{anchor}"><h2>{html.escape(name)}</h2><dl>{facts}</dl>{plots}'
    return f"{body}{_table(rows)}</section>\n"


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _flat(row: Row) -> dict[str, Any]:
    """Statistics become their median, with the tail beside it; acceptance joins the row."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key == "acceptance" and isinstance(value, dict):
            flat |= value
        elif isinstance(value, dict) and "p50" in value:
            flat |= {key: value["p50"], f"{key}_p95": value.get("p95")}
            flat[f"{key}_p99"] = value.get("p99")
        else:
            flat[key] = value
    return flat


def _load(row: Row) -> str | None:
    return next((name for name in LOADS if name in row), None)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(rows: Sequence[Row]) -> str:
    """The plain values of the rows."""
    plain = (str, int, float, bool)
    columns = list(dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, plain)))
    if not columns:
        return ""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(row.get(c)))}</td>" for c in columns) + "</tr>"
        for row in rows[:MAX_ROWS]
    )
    more = f"<p>{len(rows) - MAX_ROWS} more rows</p>" if len(rows) > MAX_ROWS else ""
    return f'<div class="wide"><table><tr>{head}</tr>{lines}</table>{more}</div>'


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, str | int) else ""


# ------------------------------------------------------------------------------------------- plots


def _svg(draw: Callable[[Any, Any], None], salt: str, data: Any) -> str:
    """The figure that ``draw`` makes of the data; ``salt`` keeps its ids apart from the others'."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise AquilineError("report: it needs matplotlib; pip install 'aquiline[plots]'") from None
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(layout="constrained")
        draw(figure, data)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    text = out.getvalue()
    return text[text.index("<svg") :]


def _curves(figure: Any, rows: Sequence[Row]) -> None:
    load = _load(rows[0]) or LOADS[0]
    sizes = sorted({row[load] for row in rows if load in row})
    figure.set_size_inches(9, 3.4)
    for (field, label), axes in zip(CURVES, figure.subplots(1, 2), strict=True):
        for name in dict.fromkeys(map(_line, rows)):
            known = [r for r in rows if _line(r) == name and load in r and r.get(field) is not None]
            places = sorted((row[load], row[field]) for row in known)
            if places:
                axes.plot(*zip(*places, strict=True), marker="o", markersize=4, label=name or None)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set(xlabel=load, ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    if any(map(_line, rows)):
        lines = axes.get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=4, fontsize=7)


def _line(row: Row) -> str:
    """What tells the lines of a plot apart."""
    names = ("task", "rule", "tree", "draft")
    parts = [str(row[name]) for name in names if isinstance(row.get(name), str)]
    if "temperature" in row:
        parts.append(f"T={row['temperature']}")
    return ", ".join(parts)


def _depths(figure: Any, rows: Sequence[Row]) -> None:
    figure.set_size_inches(6, 3.4)
    axes = figure.subplots()
    for row in rows[:12]:
        shares = row["accepted_by_depth"]
        name = _line(row) or f"{_load(row)} {row.get(_load(row) or '')}"
        axes.plot(range(1, len(shares) + 1), shares, marker="o", markersize=4, label=name)
    depth = max(len(row["accepted_by_depth"]) for row in rows)
    axes.set_xticks(range(1, depth + 1))
    axes.set(xlabel="depth", ylabel="share of rounds that accept", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _rounds(figure: Any, rows: Sequence[Row]) -> None:
    figure.set_size_inches(max(6.0, 0.5 * len(rows) + 2), 3.4)
    axes = figure.subplots()
    places = range(len(rows))
    axes.bar(places, [row["round_ms"] for row in rows], 0.7, label="round")
    axes.hlines(
        [row["limit_ms"] for row in rows], [x - 0.42 for x in places], [x + 0.42 for x in places],
        color="black", label="limit",
    )  # fmt: skip
    loads = ["\n".join(str(row.get(n, "")) for n in ("context", "batch", "draft")) for row in rows]
    axes.set_xticks(places, loads, fontsize=7)
    axes.set_ylabel("ms")
    axes.legend()


def _replays(figure: Any, rows: Sequence[Row]) -> None:
    """Every request as a point at the time it came."""
    figure.set_size_inches(9, 2.6 * len(rows))
    panels = figure.subplots(len(rows), 2, squeeze=False)
    for row, line in zip(rows, panels, strict=True):
        for (field, label), axes in zip(
            (("ttit_ms", "TTIT, ms a token"), ("ttft_ms", "TTFT, ms")), line, strict=True
        ):
            points = [(one["start"], one[field]) for one in row["each"] if one.get(field)]
            if points:
                axes.plot(*zip(*points, strict=True), ".", markersize=4)
                axes.set_ylim(0, 1.08 * max(ms for _, ms in points))
            axes.set(xlabel="arrival, s", ylabel=label)
            axes.set_title(f"concurrency {row.get('concurrency', '')}", fontsize=9)
            axes.grid(alpha=0.3)


def _trees(result: Row, rows: Iterable[Row]) -> Iterable[tuple[str, TreeShape]]:
    """Those that can be told from the result, small enough to be seen, each once."""
    listed = result.get("trees")
    asked = [*(listed if isinstance(listed, list) else []), result.get("tree")]
    asked += [row.get("tree") for row in rows]
    found: dict[TreeShape, str] = {}
    for tree in asked:
        try:
            shape = TreeShape.named(tree) if isinstance(tree, str) else TreeShape.of(tree or [])
        except (AquilineError, TypeError):
            continue  # "none", "auto", or plain decoding: nothing to draw
        if shape.size <= MAX_PICTURED:
            nodes = f"{shape.size - 1} nodes, depth {shape.depth}"
            found.setdefault(shape, tree if isinstance(tree, str) else nodes)
    return list(zip(found.values(), found, strict=True))[:MAX_PICTURES]


def _pictures(figure: Any, trees: Sequence[tuple[str, TreeShape]]) -> None:
    columns = min(3, len(trees))
    lines = -(-len(trees) // columns)
    figure.set_size_inches(3 * columns, 2.2 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    for (name, shape), axes in zip(trees, panels, strict=False):
        across = _across(shape)
        for node in range(1, shape.size):
            ends = shape.parents[node], node
            axes.plot(
                [across[n] for n in ends], [-shape.depths[n] for n in ends], color="0.6", lw=1
            )
        axes.scatter(across, [-depth for depth in shape.depths], s=14, zorder=2)
        axes.set_title(name, fontsize=9)


def _across(shape: TreeShape) -> list[float]:
    """Where each node stands: leaves side by side, a parent over the middle of its children."""
    across, leaves = [0.0] * shape.size, 0

    def place(node: int) -> float:
        nonlocal leaves
        below = [place(child) for child in shape.children[node]]
        if not below:
            leaves += 1
        across[node] = sum(below) / len(below) if below else float(leaves)
        return across[node]

    place(0)
    return across
