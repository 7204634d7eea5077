"""Whole layers and whole models on one H100, in 8 bits and in every other way that we know of.

    python -m benchmarks.h100 benchmarks/results/h100.json
    python -m benchmarks.document > BENCHMARKS.md

Models have random weights. The time of a layer is the difference between a model of 3 layers and
one of 1; the time of a whole model is computed from it, except for the column `whole`, where all
layers run. Packages of the other columns: torchao 0.18, fa3-fwd 0.0.3, sageattention 1.0.6; a
column whose package is missing says so.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import h100_cell, h100_table, record
from benchmarks.h100_plan import COLUMNS, DEEP, ROWS, SHALLOW, Job, card_gib, jobs
from benchmarks.h100_turns import Record, Scheduler, Task

_PACKAGES = ("torch", "triton", "diffusers", "torchao", "fa3-fwd", "sageattention")
_BUDGET_S = 560.0
_PROCESSES = 6


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the JSON after every figure, print the table."""
    options = _parser().parse_args(argv)
    planned = jobs(options.rows, options.columns, options.tiny)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        records = _run(planned, options, Path(folder))
    print(h100_table.summary(records))
    print(f"{len(records)} cells in {time.monotonic() - options.started:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the JSON to write")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--quick", action="store_true", help="fewer repeats, no profiles")
    parser.add_argument("--budget", type=float, default=_BUDGET_S, help="seconds for everything")
    cores = os.cpu_count() or 1
    parser.add_argument("--processes", type=int, default=max(1, min(_PROCESSES, cores // 2)))
    # For tests: the figures of tiny models on a CPU mean nothing.
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(started=time.monotonic())
    return parser


def _run(planned: list[Job], options: argparse.Namespace, folder: Path) -> list[Record]:
    how = h100_cell.Options(
        device=options.device,
        repeats=3 if options.quick else 5,
        with_profile=not options.quick,
        folder=folder,
    )

    def save(records: list[Record]) -> None:
        for one in records:
            if one.get("forward_ms") and "error" not in one:
                found = h100_cell.relative_error(folder, one["row"], one["column"])
                one.update({} if found is None else {"error": found})
        record.write(options.out.parent, options.out.stem, _settings(options), records)

    scheduler = Scheduler(
        [_task(job, how) for job in planned],
        save,
        deadline=options.started + options.budget,
        processes=options.processes,
        gib=card_gib(),
    )
    return scheduler.run()


def _task(job: Job, how: h100_cell.Options) -> Task:
    cache = h100_cell.cache_folder(how.folder, job.column.family)
    env = {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
        "OMP_NUM_THREADS": "2",
    }
    known = {"row": job.row.name, "column": job.column.name}
    return Task(job.name, h100_cell.measure, (job, how), job.limit_s, job.gib, env, known)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {
        **{k: v for k, v in record.settings(options).items() if k != "started"},
        "layers": [DEEP, SHALLOW],
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
