from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write golden files instead of comparing"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores between the workers of `pytest -n`, which else take all of them each.

    A shell that runs tests in the background has them ignore Ctrl-C, and the programs that they
    start, which are to be stopped by it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = getattr(config, "workerinput", None)
    if worker is None:
        return
    threads = max(1, (os.cpu_count() or 1) // worker["workercount"])
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for the processes that tests start


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Start a test with nothing compiled by torch.compile, and keep what its backend logs."""
    caplog.set_level(logging.INFO, "wancompile")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compare a text with `golden/<test name>.txt`, or write it with --update-golden."""

    def check(text: str) -> None:
        path = GOLDEN / (re.sub(r"[^a-z0-9_]+", "-", request.node.name.lower()).strip("-") + ".txt")
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing: run pytest --update-golden and read the file"
        assert text == path.read_text(encoding="utf-8")

    return check
