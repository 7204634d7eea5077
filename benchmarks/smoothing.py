"""What smoothing wins: errors per role and end to end, without and with outlier channels.

    python -m benchmarks.smoothing

Each trained checkpoint is compiled to int8 and fp8, without and with smoothing, as it is and after
a rescaling that gives it outlier channels and leaves its function as it was. The error is the
relative L2 distance of the outputs to those of the fp32 model, over the calls of held-out videos.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import wancompile
from benchmarks import record, subjects
from wancompile.demo.sampler import Request, calls
from wancompile.quant.stats import Stats
from wancompile.recipe import QSpec, Recipe

DTYPES = ("int8", "fp8")
Calls = Sequence[Mapping[str, Any]]


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the errors of one checkpoint and the share of them that smoothing wins back."""
    model = subjects.load(name)
    shown = calls(model, [subjects.calibration(name, options.videos, options.steps)])
    held_out = calls(model, [_held_out(name, options)])
    expected = outputs(model, held_out)
    kinds = {"original": model, "outliers": subjects.with_outliers(model)}
    errors: dict[str, Any] = {}
    for kind, subject in kinds.items():
        stats = wancompile.calibrate(subject, shown)
        errors[kind] = {"fp32": relative_error(outputs(subject, held_out), expected)}
        for dtype in DTYPES:
            errors[kind][dtype] = _of_dtype(subject, stats, shown, held_out, expected, dtype)
    return {"checkpoint": name, "errors": errors, "won_back": won_back(errors)}


def _held_out(name: str, options: argparse.Namespace) -> Request:
    """Return videos of the digits that come after those calibrated on."""
    both = options.videos + options.held_out_videos
    asked, _ = subjects.held_out(name, both, options.held_out_steps)
    return subjects.part(asked, options.videos, options.held_out_videos)


def _of_dtype(
    model: Any, stats: Stats, shown: Calls, held_out: Calls, expected: Sequence[Tensor], dtype: str
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for label, smooth in (("plain", False), ("smoothed", True)):
        recipe = Recipe(dtype, QSpec(dtype, smooth=smooth))
        compiled = wancompile.compile(  # the gate would let what is not smoothed fall back
            model, recipe=recipe, stats=stats, example_inputs=shown[0], limits=None
        )
        found[label] = relative_error(outputs(compiled, held_out), expected)
    found["roles"] = [asdict(one) for one in compiled.report.roles]
    return found


def outputs(model: Any, data: Calls) -> list[Tensor]:
    """Return what `model` predicts on each call."""
    with torch.no_grad():
        return [model(**{**call, "return_dict": False})[0] for call in data]


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return `|actual - expected| / |expected|` in L2 over all calls together."""
    pairs = zip(actual, expected, strict=True)
    lost = sum(float((a.double() - e.double()).square().sum()) for a, e in pairs)
    return float((lost / sum(float(e.double().square().sum()) for e in expected)) ** 0.5)


def won_back(errors: Mapping[str, Any]) -> float:
    """Return the share of the int8 error caused by outliers that smoothing takes away again.

    Of int8 only: the steps of a float grow with its value, so outliers cost fp8 next to nothing.
    """
    before, after = errors["original"]["int8"], errors["outliers"]["int8"]
    return (after["plain"] - after["smoothed"]) / (after["plain"] - before["plain"])


def end_to_end(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the errors of whole models."""
    headers = ["checkpoint", "type", "plain", "smoothed", "outliers plain", "smoothed", "won back"]
    return tabulate(list(_end_to_end_rows(results)), headers=headers, disable_numparse=True)


def _end_to_end_rows(results: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for one in results:
        for dtype in DTYPES:
            pair = [one["errors"][kind][dtype] for kind in ("original", "outliers")]
            cells = [_percent(each[how]) for each in pair for how in ("plain", "smoothed")]
            won_back = f"{100 * one['won_back']:.1f} %" if dtype == "int8" else "-"
            yield [one["checkpoint"], dtype, *cells, won_back]


def per_role(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the errors of each role in int8."""
    headers = ["checkpoint", "role", "plain", "smoothed", "outliers plain", "smoothed"]
    return tabulate(list(_role_rows(results)), headers=headers, disable_numparse=True)


def _role_rows(results: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for one in results:
        kinds = [one["errors"][kind]["int8"]["roles"] for kind in ("original", "outliers")]
        for pair in zip(*kinds, strict=True):
            cells = [_percent(r[how]) for r in pair for how in ("error_plain", "error_smoothed")]
            yield [one["checkpoint"], str(pair[0]["role"]), *cells]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    options = subjects.options(__doc__, argv)
    results = [measure(name, options) for name in options.names]
    print(record.write(options.out, "smoothing", record.settings(options), results))
    print(end_to_end(results), per_role(results), sep="\n\n")


if __name__ == "__main__":
    main()
