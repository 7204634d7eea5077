"""What static activation scales cost: errors end to end, beside those of scales per token.

    python -m benchmarks.static_scales

Each trained checkpoint, as it is and with outlier channels, is smoothed and computes with all its
linears in int8 or fp8: with a scale per token for each; with a static one behind GELU alone, where
the linear before it can then round in its epilogue; and with static ones for all. The error is the
relative L2 distance of the outputs to those of the fp32 model, over the calls of held-out videos.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

import wancompile
from benchmarks import record, subjects
from wancompile.demo.sampler import calls
from wancompile.ir.site import Role
from wancompile.recipe import QSpec, Recipe, Rule
from wancompile.sensitivity import HeldOut

DTYPES = ("int8", "fp8")
COLUMNS = ("per token", "static behind GELU", "all static")


def recipe(dtype: str, column: str) -> Recipe:
    """Return the recipe of a column."""
    static = QSpec(dtype, activation="static")
    if column == "all static":
        return Recipe(column, static)
    rules = (Rule(str(Role.FFN_DOWN), static),) if column == "static behind GELU" else ()
    return Recipe(column, QSpec(dtype), rules)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the errors of one checkpoint, by kind, type and column."""
    model = subjects.load(name)
    shown = calls(model, [subjects.calibration(name, options.videos, options.steps)])
    asked, _ = subjects.held_out(name, options.held_out_videos, options.held_out_steps)
    unseen = calls(model, [asked])
    errors = {}
    for kind, subject in {"original": model, "outliers": subjects.with_outliers(model)}.items():
        stats = wancompile.calibrate(subject, shown)
        held_out = HeldOut.of(wancompile.trace(subject, shown[0]), unseen, stats)
        errors[kind] = {
            dtype: {column: held_out.error_of(recipe(dtype, column)) for column in COLUMNS}
            for dtype in DTYPES
        }
    return {"checkpoint": name, "errors": errors}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a row for each checkpoint, kind and type."""
    headers = ["checkpoint", "kind", "type", *COLUMNS]
    return tabulate(list(_rows(results)), headers=headers, disable_numparse=True)


def _rows(results: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for one in results:
        for kind, types in one["errors"].items():
            for dtype, errors in types.items():
                cells = [f"{100 * errors[column]:.3f} %" for column in COLUMNS]
                yield [one["checkpoint"], kind, dtype, *cells]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    options = subjects.options(__doc__, argv)
    results = [measure(name, options) for name in options.names]
    print(record.write(options.out, "static_scales", record.settings(options), results))
    print(table(results))


if __name__ == "__main__":
    main()
