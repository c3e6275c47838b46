"""The engines of tests, on one thread."""

import pytest
import torch

from tests.tiny_engine import folders, make  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
