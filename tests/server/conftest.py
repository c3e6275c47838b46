"""One server a test session, and the same model in this process to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch

from aquiline.engine.llm import LLM
from tests.server.http_server import Running, serving
from tests.tiny_checkpoint import write_draft, write_target

CONTEXT = 2048


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    write_target(root / "target", mix=0.15, context=CONTEXT)
    write_draft(root / "draft", context=CONTEXT)
    return root


@pytest.fixture(scope="session")
def server(checkpoints: Path) -> Iterator[Running]:
    log = checkpoints / "server.log"
    flags = ("--max-num-seqs", "8", "--max-body-bytes", "100000")
    with serving(checkpoints / "target", checkpoints / "draft", log, *flags) as running:
        yield running


@pytest.fixture(scope="session")
def alone(checkpoints: Path) -> LLM:
    """The target without speculation."""
    torch.set_num_threads(1)
    return LLM(str(checkpoints / "target"), "float64")


@pytest.fixture(scope="session")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
