"""A saved model of full size: bytes on disk, seconds to load, and what one or two need.

    python -m benchmarks.artifact [--preset t2v-14b] [--device cuda]

The model has random bf16 weights, which serve for cost and say nothing about errors. It is compiled
and saved by one process. A second one imports, loads to the device and runs a first call at full
size, as a user's would, then loads the same once more, as the other expert of a pipeline, and calls
both in turn. Files were just written, so they are read from the host's memory, not from a disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import wancompile
from benchmarks import record
from benchmarks.h100_model import build, calibration, inputs, peak_gib, seconds, synchronize
from benchmarks.h100_plan import Row
from wancompile import presets

GIB = 1 << 30
_NAME = "artifact"


def save(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compile the model, write it to `folder`, and return what that took."""
    device, row = torch.device(options.device), _row(options)
    model = build(row, options.layers or row.layers, device, options.tiny)
    original = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    call = calibration(row, device, options.tiny)
    started = time.perf_counter()
    compiled = wancompile.compile(model, [call], options.recipe, consume=True, limits=None)
    synchronize(device)
    made = time.perf_counter()
    compiled.save(folder)
    saved = time.perf_counter()
    on_disk = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "bf16_gib": original / GIB,
        "disk_gib": on_disk / GIB,
        "disk_over_bf16": on_disk / original,
        "compile_s": made - started,
        "save_s": saved - made,
    }


def load(options: argparse.Namespace, folder: Path, started: float) -> dict[str, Any]:
    """Load what `save` wrote, in a process that started at `started`, and call it."""
    device, row = torch.device(options.device), _row(options)
    call = inputs(row, device, options.tiny)
    synchronize(device)
    ready = time.time()
    model = wancompile.load(folder, device=device)
    synchronize(device)
    loaded = time.time()
    first = seconds(lambda: model(**call), device)
    found = {
        "import_s": ready - started,
        "load_s": loaded - ready,
        "first_call_s": first,
        "second_call_s": seconds(lambda: model(**call), device),
        "weights_gib": model.nbytes / GIB,
        "peak_gib": peak_gib(lambda: model(**call), device, 0.0),
    }
    other = wancompile.load(folder, device=device)
    found["two_experts_peak_gib"] = peak_gib(lambda: (model(**call), other(**call)), device, 0.0)
    return found


def _row(options: argparse.Namespace) -> Row:
    return Row(_NAME, options.preset, presets.find(options.preset).latent, "")


def measure(argv: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Save and load in processes of their own, and write the result."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        for step in ("save", "load"):
            found |= _in_process(step, folder, argv)
            path = record.write(options.out, _NAME, record.settings(options), found)
            print(f"{step}: {path}", flush=True)
    return found


def _in_process(step: str, folder: Path, argv: Sequence[str]) -> dict[str, Any]:
    own = ["--step", step, "--folder", str(folder), "--started", str(time.time())]
    command = [sys.executable, "-m", "benchmarks.artifact", *argv, *own]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    if options.step == "save":
        print(json.dumps(save(options, options.folder)))
    elif options.step == "load":
        print(json.dumps(load(options, options.folder, options.started)))
    else:
        print(tabulate(measure(argv, options).items(), floatfmt=".2f", tablefmt="plain"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", default="t2v-14b")
    parser.add_argument("--layers", type=int, help="blocks; all by default")
    parser.add_argument("--recipe", default="int8-attention")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    # For the processes that `measure` starts.
    parser.add_argument("--step", choices=("save", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
