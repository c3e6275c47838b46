"""Plots of stored results as PNG.

    python -m benchmarks.plots benchmarks/results/round.json benchmarks/results/smollm2_gpu.json

``round.json`` (rows of context, batch, draft, round_ms, limit_ms) becomes bars with the limit drawn
across each; ``smollm2_gpu.json`` (rows of batch, tree, temperature, tokens_per_call, ttit_ms,
speedup) becomes curves over the batch, one row of panels for each temperature;
``draft_quality.json`` (rows of draft, layers, tokens, objective, task, temperature, chain,
tokens_per_call) becomes TPC by tokens trained on, by layers and by objective. The section
``replay`` of ``serving.json`` becomes ``replay.png``: requests over the time they came. Needs
matplotlib: pip install 'aquiline[plots]'.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
ROUND_FIELDS = {"context", "batch", "draft", "round_ms", "limit_ms"}
QUALITY_FIELDS = {"draft", "layers", "tokens", "objective", "tokens_per_call"}
CURVES = (("ttit_ms", "ms per output token"), ("speedup", "speed-up over plain"))


def plot_rounds(result: Mapping[str, Any], out: Path) -> None:
    """Milliseconds of a round per load and draft, against the limit of bytes over bandwidth."""
    import matplotlib.pyplot as plt

    rows: Sequence[Row] = result["rows"]
    loads = list(dict.fromkeys((row["context"], row["batch"]) for row in rows))
    at_load = {load: [r for r in rows if (r["context"], r["batch"]) == load] for load in loads}
    width = 0.8 / max(map(len, at_load.values()))

    def place(row: Row) -> float:
        """The bars of a load stand side by side around its tick."""
        load = row["context"], row["batch"]
        return loads.index(load) + (at_load[load].index(row) - (len(at_load[load]) - 1) / 2) * width

    figure, axes = plt.subplots(figsize=(max(6.0, 0.45 * len(rows) + 2), 4.5), layout="constrained")
    for number, draft in enumerate(dict.fromkeys(row["draft"] for row in rows)):
        ours = [row for row in rows if row["draft"] == draft]
        places = [place(row) for row in ours]
        axes.bar(places, [row["round_ms"] for row in ours], 0.9 * width, label=draft)
        limits = [row["limit_ms"] for row in ours]
        axes.hlines(
            limits, [x - width / 2 for x in places], [x + width / 2 for x in places],
            color="black", label="limit" if number == 0 else None,
        )  # fmt: skip
    axes.set_xticks(range(len(loads)), [f"{context}\n{batch}" for context, batch in loads])
    axes.set_xlabel("context\nbatch")
    axes.set_ylabel("ms per round")
    axes.set_title(_title(result))
    axes.legend()
    _save(figure, out)


def plot_curves(result: Mapping[str, Any], out: Path) -> None:
    """TTIT and speed-up over the batch, a line for each tree, a row for each temperature."""
    import matplotlib.pyplot as plt

    rows: Sequence[Row] = result["rows"]
    temperatures = sorted({row["temperature"] for row in rows})
    size = (10, 3.6 * len(temperatures))
    figure, panels = plt.subplots(
        len(temperatures), len(CURVES), figsize=size, squeeze=False, layout="constrained"
    )
    for temperature, line in zip(temperatures, panels, strict=True):
        for (field, label), axes in zip(CURVES, line, strict=True):
            for tree in dict.fromkeys(row["tree"] for row in rows):
                found = sorted(
                    (row["batch"], row[field])
                    for row in rows
                    if row["tree"] == tree and row["temperature"] == temperature
                )
                if found:
                    axes.plot(*zip(*found, strict=True), marker="o", label=tree)
            batches = sorted({row["batch"] for row in rows})
            axes.set_xscale("log", base=2)
            axes.set_xticks(batches, [str(batch) for batch in batches])
            axes.set_ylim(bottom=0)
            axes.set_xlabel("batch")
            axes.set_ylabel(label)
            axes.set_title(f"T={temperature}")
            axes.grid(alpha=0.3)
    panels[0][0].legend()
    figure.suptitle(_title(result))
    _save(figure, out)


def plot_quality(result: Mapping[str, Any], out: Path) -> None:
    """TPC against tokens, layers and objective: the largest set of drafts that differ in that one
    alone. A line for each task, a row of panels for each temperature and chain."""
    import matplotlib.pyplot as plt

    rows: Sequence[Row] = result["rows"]
    lines = sorted({(row["temperature"], row["chain"]) for row in rows})
    figure, panels = plt.subplots(
        len(lines), 3, figsize=(13, 3.4 * len(lines)), squeeze=False, layout="constrained"
    )
    for (temperature, chain), (over_tokens, over_layers, objectives) in zip(
        lines, panels, strict=True
    ):
        ours = [r for r in rows if (r["temperature"], r["chain"]) == (temperature, chain)]
        tasks = list(dict.fromkeys(row["task"] for row in ours))
        for field, axes in (("tokens", over_tokens), ("layers", over_layers)):
            compared = _differ_in(field, ours)
            for task in tasks:
                found = sorted(
                    (r[field], r["tokens_per_call"]) for r in compared if r["task"] == task
                )
                if found:
                    axes.plot(*zip(*found, strict=True), marker="o", label=task)
        compared = _differ_in("objective", ours)
        names = list(dict.fromkeys(row["objective"] for row in compared))
        for number, task in enumerate(tasks):
            found = [r for r in compared if r["task"] == task]
            places = [names.index(r["objective"]) + 0.25 * (number - 1) for r in found]
            objectives.bar(places, [r["tokens_per_call"] for r in found], 0.23, label=task)
        over_tokens.set_xscale("log")
        over_tokens.set_xlabel("tokens trained on")
        over_layers.set_xlabel("draft layers")
        over_layers.set_xticks(sorted({row["layers"] for row in ours}))
        objectives.set_xticks(range(len(names)), names, rotation=20)
        for axes in (over_tokens, over_layers, objectives):
            axes.set_ylabel("tokens per call")
            axes.set_title(f"T={temperature:g}, chain {chain}")
            axes.grid(alpha=0.3)
    for axes in panels[0]:
        if axes.has_data():
            axes.legend()
    figure.suptitle(_title(result))
    _save(figure, out)


def plot_replay(result: Mapping[str, Any], out: Path) -> None:
    """TTFT and TTIT of each request at the time it came, and how many were in flight."""
    import matplotlib.pyplot as plt

    each: Sequence[Row] = [one for one in result["rows"][0]["each"] if "error" not in one]
    starts = [one["start"] for one in each]
    changes = sorted(
        change
        for one in each
        for change in ((one["start"], 1), (one["start"] + one["e2e_ms"] / 1e3, -1))
    )
    in_flight = list(itertools.accumulate(change for _, change in changes))
    figure, panels = plt.subplots(3, 1, figsize=(9, 7.5), sharex=True, layout="constrained")
    for axes, field, label in zip(panels, ("ttft_ms", "ttit_ms"), ("TTFT, ms", "TTIT, ms"),
                                  strict=False):  # fmt: skip
        axes.plot(starts, [one[field] for one in each], ".")
        axes.set_ylabel(label)
    panels[2].step([at for at, _ in changes], in_flight, where="post")
    panels[2].set_ylabel("requests in flight")
    panels[2].set_xlabel("seconds; of TTFT and TTIT: the request's arrival")
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.suptitle(_title(result))
    _save(figure, out)


def _differ_in(field: str, rows: Sequence[Row]) -> list[Row]:
    """The rows with the most values of ``field`` among those that agree in the other two."""
    others = [name for name in ("layers", "tokens", "objective") if name != field]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if None not in (row["layers"], row["tokens"], row["objective"]):
            groups.setdefault(tuple(row[name] for name in others), []).append(row)
    values = {key: len({row[field] for row in group}) for key, group in groups.items()}
    best = max(values, key=values.__getitem__, default=None)
    return [] if best is None else groups[best]


def plot(path: Path) -> Path:
    """Plot a result file beside itself, by its section or the fields of its rows."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if "replay" in result:
        out = path.with_name("replay.png")
        plot_replay(result["replay"], out)
        return out
    out, fields = path.with_suffix(".png"), set(result["rows"][0])
    draw = plot_curves
    if fields >= ROUND_FIELDS:
        draw = plot_rounds
    elif fields >= QUALITY_FIELDS:
        draw = plot_quality
    draw(result, out)
    return out


def _title(result: Mapping[str, Any]) -> str:
    return f"{result.get('device', '')} · {result.get('commit', '')} · {result.get('date', '')}"


def _save(figure: Any, out: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(out, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", type=Path, nargs="+")
    options = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        parser.error("matplotlib is not installed; run pip install 'aquiline[plots]'")
    matplotlib.use("agg")
    for path in options.results:
        print(plot(path))


if __name__ == "__main__":
    main()
