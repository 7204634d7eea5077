"""What static activation scales cost: errors end to end, beside those of scales per token.

    python -m benchmarks.static_scales

Each trained checkpoint, as it is and with outlier channels, is compiled to int8 and fp8 with a
scale per token for every linear, with a static one for the linear behind GELU alone (which the
linear before it can then round in its epilogue), and with static ones for all. The error is the
relative L2 distance of the outputs to those of the fp32 model, over the calls of held-out videos.
Clipped is the largest share of values with the largest code among inputs with a static scale.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

import wancompile
from benchmarks import record, subjects
from benchmarks.smoothing import outputs, relative_error
from wancompile.demo.sampler import calls
from wancompile.recipe import QSpec, Recipe, Rule

DTYPES = ("int8", "fp8")
COLUMNS = ("token", "behind GELU static", "all static")


def recipe(dtype: str, column: str) -> Recipe:
    """Return the recipe of a column."""
    static = QSpec(dtype, activation="static")
    if column == "all static":
        return Recipe(column, static)
    rules = (Rule("ffn_down_proj", static),) if column == "behind GELU static" else ()
    return Recipe(column, QSpec(dtype), rules)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the errors of one checkpoint, by kind, type and column."""
    model = subjects.load(name)
    shown = calls(model, [subjects.calibration(name, options.videos, options.steps)])
    asked, _ = subjects.held_out(name, options.held_out_videos, options.held_out_steps)
    held_out = calls(model, [asked])
    kinds = {"original": model, "outliers": subjects.with_outliers(model)}
    expected = outputs(model, held_out)
    found: dict[str, Any] = {}
    for kind, subject in kinds.items():
        stats = wancompile.calibrate(subject, shown)
        found[kind] = {}
        for dtype in DTYPES:
            found[kind][dtype] = {}
            for column in COLUMNS:
                compiled = wancompile.compile(  # the gate would let what clips fall back
                    subject,
                    recipe=recipe(dtype, column),
                    stats=stats,
                    example_inputs=shown[0],
                    limits=None,
                )
                check = compiled.check(held_out[:: options.check_every], reference=subject)
                found[kind][dtype][column] = {
                    "error": relative_error(outputs(compiled, held_out), expected),
                    "clipped": max(check.clipped.values(), default=0.0),
                }
    return {"checkpoint": name, "errors": found}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a row for each checkpoint, kind and type."""
    headers = ["checkpoint", "kind", "type", *COLUMNS, "clipped, all static"]
    return tabulate(list(_rows(results)), headers=headers, disable_numparse=True)


def _rows(results: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for one in results:
        for kind, types in one["errors"].items():
            for dtype, columns in types.items():
                cells = [f"{100 * columns[column]['error']:.3f} %" for column in COLUMNS]
                clipped = f"{100 * columns['all static']['clipped']:.3f} %"
                yield [one["checkpoint"], kind, dtype, *cells, clipped]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=subjects.NAMES, metavar="t2v|i2v")
    parser.add_argument("--videos", type=int, default=4, help="to calibrate on")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--held-out-videos", type=int, default=2)
    parser.add_argument("--held-out-steps", type=int, default=4)
    parser.add_argument("--check-every", type=int, default=4, help="of the held-out calls")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    results = [measure(name, options) for name in options.names]
    print(record.write(options.out, "static_scales", record.settings(options), results))
    print(table(results))


if __name__ == "__main__":
    main()
