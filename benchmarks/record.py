"""Raw results as JSON, with what they were measured on."""

from __future__ import annotations

import argparse
import json
import os
import platform
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
    return {name: value for name, value in vars(options).items() if name != "out"}


def _surroundings() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
