"""Everything in this folder needs a CUDA device."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def cuda() -> torch.device:
    print(f"seed {torch.seed()}")  # fresh data each time; pytest shows this when a test fails
    return torch.device("cuda", torch.cuda.current_device())
