"""Plots of stored results as PNG.

    python -m benchmarks.plots benchmarks/results/round.json benchmarks/results/smollm2_gpu.json

``round.json`` (rows of context, batch, draft, round_ms, limit_ms) becomes bars with the limit drawn
across each; ``smollm2_gpu.json`` (rows of batch, tree, temperature, tokens_per_call, ttit_ms,
speedup) becomes curves over the batch, one row of panels for each temperature. Needs matplotlib:
pip install 'aquiline[plots]'.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
ROUND_FIELDS = {"context", "batch", "draft", "round_ms", "limit_ms"}
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


def plot(path: Path) -> Path:
    """Plot a result file beside itself, by the fields of its rows."""
    result = json.loads(path.read_text(encoding="utf-8"))
    out = path.with_suffix(".png")
    draw = plot_rounds if set(result["rows"][0]) >= ROUND_FIELDS else plot_curves
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
