"""``aquiline report``: stored results as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aquiline.core.errors import AquilineError
from aquiline.evaluation.report import load_results, page


def report(
    results: Annotated[list[Path], typer.Argument(help="JSON files of bench, evaluate, tune, ...")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Of the page.")] = "aquiline: results",
) -> None:
    """Plots and figures of stored results; the page needs nothing else to be looked at."""
    text = page(load_results(results), title)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AquilineError(f"--out {out}: {error}; give a writable file") from None
    print(out)
