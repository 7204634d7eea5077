"""What planning the largest model costs, and how the time of all passes grows with its layers.

    python -m benchmarks.planning

`wancompile plan` runs in a process of its own, with everything that a user waits for. The passes
run on the same model with its widths shrunk and random weights, since their time is that of
rewriting graphs, from the exported program to the lowered one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks import record
from wancompile import passes, pipeline, presets
from wancompile.calibrate import Calibration
from wancompile.export import export
from wancompile.pipeline import Pass
from wancompile.program import Program
from wancompile.quant.stats import Stats
from wancompile.recipe import resolve

GIB = 1 << 30


def plan(preset: str, repeats: int) -> dict[str, Any]:
    """Return median seconds and largest peak memory of `wancompile plan` as a command."""
    runs = [_plan_once(preset) for _ in range(repeats)]
    return {
        "preset": preset,
        "seconds": statistics.median(one["seconds"] for one in runs),
        "peak_gib": max(one["peak_gib"] for one in runs),
        "runs": runs,
    }


def _plan_once(preset: str) -> dict[str, float]:
    command = [sys.executable, "-m", "wancompile.cli", "plan", preset, "--json"]
    started = time.perf_counter()
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - started
    # The system counts from the size of this process, which is smaller, on.
    return {"seconds": seconds, "peak_gib": json.loads(printed)["peak_bytes"] / GIB}


def passes_per_layer(preset: str, layers: Sequence[int], repeats: int) -> dict[str, Any]:
    """Return the seconds of all passes by number of layers, and per layer over those of the first.

    The first model is gone through once more before anything is timed: what the process does only
    once, such as importing, is not the work of a layer.
    """
    seconds_of_passes(preset, layers[0], 1)
    medians = {
        count: statistics.median(seconds_of_passes(preset, count, repeats)) for count in layers
    }
    first = medians[layers[0]] / layers[0]
    return {
        "preset": preset,
        "seconds": medians,
        "ratio": {count: seconds / count / first for count, seconds in medians.items()},
    }


def seconds_of_passes(preset: str, layers: int, repeats: int) -> list[float]:
    """Return how long all passes took on the same exported program, each time from the start."""
    torch.manual_seed(0)
    tiny = presets.truncated(presets.tiny(presets.find(preset)), layers)
    model = presets.build(tiny, device="cpu", dtype=torch.float32)
    call = presets.example_inputs(tiny, device="cpu", dtype=torch.float32)
    exported = export(model, [call])
    recipe = resolve("int8-attention")
    stats = _stats(exported, call)
    todo = (
        *passes.NORMALIZE,
        *passes.smoothing(recipe, stats),
        *passes.quantization(recipe, stats),
        *passes.FUSE,
        *passes.lowering(torch.device("cpu")),
    )
    return [_seconds(exported, todo) for _ in range(repeats)]


def _stats(exported: Program, call: Mapping[str, Any]) -> Stats:
    calibration = Calibration(pipeline.run(exported, passes.NORMALIZE))
    calibration(**call)
    return calibration.stats()


def _seconds(program: Program, todo: Sequence[Pass]) -> float:
    started = time.perf_counter()
    pipeline.run(program, todo)
    return time.perf_counter() - started


def tables(planned: dict[str, Any], grown: dict[str, Any]) -> str:
    """Return both measurements as text."""
    cost = tabulate(
        [[planned["preset"], planned["seconds"], planned["peak_gib"]]],
        headers=["plan", "seconds", "peak GiB"],
        floatfmt=".2f",
    )
    growth = tabulate(
        [[count, grown["seconds"][count], grown["ratio"][count]] for count in grown["seconds"]],
        headers=["layers", "seconds of all passes", "per layer, over the first"],
        floatfmt=".2f",
    )
    return f"{cost}\n\n{growth}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", default="i2v-14b")
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    planned = plan(options.preset, options.repeats)
    grown = passes_per_layer(options.preset, options.layers, options.repeats)
    print(record.write(options.out, "planning", record.settings(options), [planned, grown]))
    print(tables(planned, grown))


if __name__ == "__main__":
    main()
