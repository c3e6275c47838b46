"""The cost of a grammar, measured on tiny models."""

from __future__ import annotations

from benchmarks.grammar_cost import rows_of
from benchmarks.shapes import models_for


def test_rows_of_a_batch_with_forms_with_some_and_without():
    rows = rows_of(models_for("cpu"), 2, 16, 6)
    assert [row["form"] for row in rows] == ["none", "form", "mixed"]
    none, form, mixed = rows
    assert none["times_none"] == 1
    assert form["tpc"] > none["tpc"]  # at the least, the one token that the form allows
    assert all(row["round_ms"] > 0 for row in (none, form, mixed))
