"""The cost of a grammar, measured on tiny models."""

from __future__ import annotations

import pytest

from benchmarks.grammar_cost import rows_of
from benchmarks.shapes import models_for


def test_rows_of_a_batch_with_forms_with_some_and_without():
    rows = rows_of(models_for("cpu"), 2, 16, 6)
    assert [row["form"] for row in rows] == ["none", "form", "mixed"]
    limit = rows[0]["round_ms"]
    for row in rows:
        assert 1 <= row["tpc"] <= 4
        assert row["ttit_ms"] == pytest.approx(row["round_ms"] / row["tpc"], rel=1e-2)
        assert row["times_none"] == pytest.approx(row["round_ms"] / limit, rel=1e-2)
