"""The report: one page that needs nothing else, with what each result's rows allow."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from aquiline.core.errors import AquilineError
from aquiline.evaluation.report import _across, load_results, page
from aquiline.speculation.tree import TreeShape

STORED = sorted((Path(__file__).parents[2] / "benchmarks/results").glob("*.json"))
TIMES = {"mean": 9.0, "p50": 8.0, "p95": 20.0, "p99": 30.0}
SERVE = {
    "benchmark": "serve", "command": "aquiline bench serve --base-url <x>", "date": "2026-11-25",
    "rows": [
        {
            "concurrency": size, "ttit_ms": TIMES, "ttft_ms": TIMES,
            "tokens_per_second": 50.0 * size,
            "acceptance": {"tokens_per_call": 2.4, "accepted_by_depth": [0.7, 0.5, 0.2]},
            "each": [{"start": 0.5 * i, "ttft_ms": 40.0 + i, "ttit_ms": 8.0} for i in range(5)]
            + [{"start": 3.0, "error": "ReadError: gone"}],
        }
        for size in (1, 8)
    ],
}  # fmt: skip


def figures(text: str) -> list[ElementTree.Element]:
    """The page's pictures; each has to be well-formed."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def words(svg: ElementTree.Element) -> set[str]:
    return {"".join(node.itertext()) for node in svg.iter() if node.tag.endswith("}text")}


def test_a_load_gets_curves_acceptance_and_times_of_arrival() -> None:
    text = page({"serve.json": SERVE})
    curves, depths, replay = figures(text)
    assert {"concurrency", "TTIT, ms a token", "tokens a second"} <= words(curves)
    assert {"depth", "concurrency 1", "concurrency 8"} <= words(depths)
    assert {"TTFT, ms", "arrival, s", "concurrency 8"} <= words(replay)
    assert "<td>2.4</td>" in text
    assert "<td>30</td>" in text, "the tail stands beside the median"
    assert "&lt;x&gt;" in text
    assert "<x>" not in text


def test_trees_are_drawn_once_and_a_plain_row_is_no_tree() -> None:
    rows = [{"tree": name, "batch": 1, "ttit_ms": 3.0, "tokens_per_second": 9.0}
            for name in ("none", "chain-3", "eagle-25", "chain-3", "auto")]  # fmt: skip
    _, pictures = figures(page({"a": {"rows": rows, "trees": [[[0], [1]], []]}}))
    assert {"2 nodes, depth 1", "chain-3", "eagle-25"} == words(pictures)


def test_every_tree_is_laid_out_without_two_nodes_in_one_place() -> None:
    for shape in (
        TreeShape.named("eagle-25"),
        TreeShape.chain(3),
        TreeShape.chain(2).retrieving(3),
    ):
        places = list(zip(_across(shape), shape.depths, strict=True))
        assert len(set(places)) == shape.size


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.name)
def test_every_stored_result_makes_a_page_that_needs_nothing_else(path: Path) -> None:
    text = page(load_results([path]))
    figures(text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import|<script', text)
    assert path.name in text
    ids = re.findall(r' id="([^"]+)"', text)
    sections = [name for name in ids if re.fullmatch(r"r\d+", name)]
    assert len(sections) == len(set(sections))


def test_acceptance_and_rounds_of_the_stored_results_are_plotted() -> None:
    stored = {path.name: path for path in STORED}
    depths = figures(page(load_results([stored["acceptance.json"]])))[0]
    assert any("humaneval" in word for word in words(depths))
    rounds = figures(page(load_results([stored["round.json"]])))[0]
    assert {"limit", "round"} <= words(rounds)


def test_what_is_no_result_is_refused_by_name(tmp_path: Path) -> None:
    for name, text in (("a.json", "{"), ("b.json", "3")):
        (tmp_path / name).write_text(text)
        with pytest.raises(AquilineError, match=name):
            load_results([tmp_path / name])
    with pytest.raises(AquilineError, match="absent"):
        load_results([tmp_path / "absent.json"])
    (tmp_path / "c.json").write_text(json.dumps([{"rows": []}, {"rows": []}]))
    assert list(load_results([tmp_path / "c.json"])) == ["c.json, 1", "c.json, 2"]


def test_sections_of_a_file_are_results_of_their_own(tmp_path: Path) -> None:
    sections = {"load": {"command": "a"}, "replay": {**SERVE, "rows": SERVE["rows"][:1]}}
    paths = [tmp_path / folder / "serving.json" for folder in ("x", "y")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(json.dumps(sections))
    found = load_results(paths)
    assert list(found) == [
        "serving.json, load", "serving.json, replay", f"{paths[1]}, load", f"{paths[1]}, replay",
    ]  # fmt: skip
    text = page(load_results(paths[:1]))
    assert len(figures(text)) == 3
    assert "start" not in re.sub(r"<svg.*?</svg>|<style.*?</style>", "", text, flags=re.DOTALL)
