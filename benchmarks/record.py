"""Raw results as JSON, with what they were measured on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def write(folder: Path, name: str, settings: Any, results: Any) -> Path:
    """Write `folder/name.json` and return its path; NaN and infinity are refused."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {"measured_on": _surroundings(), "settings": settings, "results": results}
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a benchmark that its results depend on."""
    given = {name: value for name, value in vars(options).items() if name != "out"}
    return {name: _plain(value) for name, value in given.items()}


def kept(options: argparse.Namespace, name: str, compared: Iterable[str]) -> Any:
    """Return the results of `name` in `options.out`, for a run that keeps a part of them.

    Raises:
        ValueError: they were measured with other settings, among those to be compared.
    """
    data = json.loads((options.out / f"{name}.json").read_text(encoding="utf-8"))
    now = settings(options)
    other = [key for key in compared if data["settings"][key] != now[key]]
    if other:
        raise ValueError(f"what is to be kept was measured with other settings: {', '.join(other)}")
    return data["results"]


def _plain(value: Any) -> Any:
    """Return an option as JSON can hold it; infinity, for no limit, it cannot."""
    return None if value == float("inf") else value


def _surroundings() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


@dataclass
class Budget:
    """Seconds for all parts of a benchmark, counted from when this is made.

    A part is begun only if as much time is left as the longest one before it took, so that what was
    begun is done in time and the rest can be said to be left out.
    """

    seconds: float
    _started: float = field(default_factory=lambda: time.monotonic())
    _longest: float = 0.0

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._started + self.seconds - time.monotonic()

    def allows(self) -> bool:
        """Whether one more part may begin."""
        return self.left > self._longest

    @contextmanager
    def spend(self) -> Iterator[None]:
        """Count what happens inside as one part."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._longest = max(self._longest, time.monotonic() - before)
