"""The largest figures that the gate sees of each recipe, which its limits are set from.

    python -m benchmarks.accuracy_gate [t2v i2v] [--recipes fp8-attention]

The trained checkpoints, as they are and with outlier channels, are compiled on the schedule that is
sampled with, under no limits, so that nothing falls back. "not smoothed" is int8 without a smooth
scale: what limits are there to refuse, where channels stand out.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tabulate import tabulate

import wancompile
from benchmarks import record, subjects
from benchmarks.accuracy import KINDS
from wancompile.gate.check import Check
from wancompile.gate.limits import Limits
from wancompile.recipe import RECIPES, QSpec, Recipe

_NOT_SMOOTHED = "not smoothed"
_CHOICES: Mapping[str, Recipe] = {
    **RECIPES,
    _NOT_SMOOTHED: Recipe(_NOT_SMOOTHED, QSpec("int8", smooth=False)),
}
_NO_LIMITS = Limits(**{field.name: float("inf") for field in fields(Limits)})  # type: ignore[arg-type]
_FIGURES = ("own", "site", "block", "output", "clipped")


def measure(name: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the largest figures of each recipe on one subject, shares of 1."""
    model = subjects.load(name)
    shown = subjects.alternating(model, subjects.calibration(name, options.videos, options.steps))
    subject = model if kind == "plain" else subjects.with_outliers(model)
    recipes = {}
    for recipe in options.recipes:
        compiled = wancompile.compile(subject, shown, _CHOICES[recipe], limits=_NO_LIMITS)
        recipes[recipe] = largest(compiled.report.gate.check)
        print(name, kind, recipe, recipes[recipe], flush=True)
    return {"checkpoint": name, "kind": kind, "recipes": recipes}


def largest(check: Check) -> dict[str, float]:
    """Return the largest figure of each kind that has a limit, 0 where there is none."""
    found = {
        "own": check.own.values(),
        "site": [one.relative for one in check.sites],
        "block": [one.relative for one in check.blocks],
        "output": [one.relative for one in check.outputs],
        "clipped": check.clipped.values(),
    }
    return {kind: float(max(found[kind], default=0.0)) for kind in _FIGURES}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each recipe and subject."""
    rows = [
        [
            found["checkpoint"],
            found["kind"],
            recipe,
            *(f"{100 * one[kind]:.2f} %" for kind in _FIGURES),
        ]
        for found in results
        for recipe, one in found["recipes"].items()
    ]
    return tabulate(rows, ["", "", "recipe", *_FIGURES], disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write after each subject, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=subjects.NAMES, metavar="t2v|i2v")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--recipes", nargs="+", default=list(_CHOICES), choices=_CHOICES)
    parser.add_argument("--videos", type=int, default=4, help="to calibrate on")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    results = []
    for name, kind in itertools.product(options.names, options.kinds):
        results.append(measure(name, kind, options))
        record.write(options.out, "gate", record.settings(options), results)
    print(table(results))


if __name__ == "__main__":
    main()
