"""How near the search for a smooth scale comes to the best of a fine grid.

    python -m benchmarks.exhaustive

For every fifth group of the trained checkpoints, as they are and with outlier channels, the scale
that the search chooses is compared with the best of a grid: all pairs of spans, both exponents from
0 to 1. "search" is the error of the former over that of the latter on the tokens that both looked
at, "held-out" on those that neither did. Below 1, the search stepped between the grid's points.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import wancompile
from benchmarks import record, subjects
from wancompile.demo.sampler import calls
from wancompile.ir.site import Span
from wancompile.quant.judge import different, halves
from wancompile.quant.search import Probe, Weights, choose, smooth_scale
from wancompile.recipe import DTYPES


def measure(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the figures of each group and type of one checkpoint."""
    model = subjects.load(name)
    shown = calls(model, [subjects.calibration(name, options.videos, options.steps)])
    for kind, subject in (("plain", model), ("outliers", subjects.with_outliers(model))):
        stats = wancompile.calibrate(subject, shown)
        groups = wancompile.trace(subject, shown[0]).groups
        for group in groups[:: options.stride]:
            seen = stats.channels[group.observer]
            weights = [subject.get_submodule(site.path).weight.detach() for site in group.sites]
            for dtype in DTYPES:
                found = compare(seen.amax.amax(0), weights, seen.tokens, dtype, options.points)
                yield {"checkpoint": name, "kind": kind, "group": str(group.key), **found}


def compare(
    amax: Tensor, weights: Sequence[Tensor], tokens: Tensor, dtype: str, points: int
) -> dict[str, Any]:
    """Compare both searches for one group; the grid has `points` values of each exponent."""
    looked = Weights.of(weights, sum(map(len, weights)))
    began = time.perf_counter()
    choice = choose(amax, looked, tokens, DTYPES[dtype])
    seconds = time.perf_counter() - began
    if choice is None:
        raise ValueError("too few tokens were sampled to search with")
    training, held_out = halves(different(tokens))
    probe, judge = (Probe(half, looked.rows, DTYPES[dtype]) for half in (training, held_out))
    spans = {Span.AMAX: amax, Span.RMS: training.square().mean(0).sqrt()}
    scales = _grid(spans, looked.spans(), points)
    best = min(scales, key=lambda scale: probe.losses(scale).error)
    pair = (choice.best.scale, best)
    trained, held = ([one.losses(scale).error for scale in pair] for one in (probe, judge))
    return {
        "dtype": dtype,
        "tokens": len(training) + len(held_out),
        "seconds": seconds,
        "plain": choice.error_plain,
        "smoothed": choice.error_smoothed,
        "search": trained[0] / trained[1],
        "held_out": held[0] / held[1],
    }


def _grid(
    spans_x: Mapping[Span, Tensor], spans_w: Mapping[Span, Tensor], points: int
) -> Iterator[Tensor]:
    exponents = torch.linspace(0, 1, points).tolist()
    for x, w in product(spans_x.values(), spans_w.values()):
        for alpha, beta in product(exponents, exponents):
            yield smooth_scale(x, w, alpha, beta)


def table(results: Sequence[Mapping[str, Any]], form: str = "simple") -> str:
    """Return means and worst cases by checkpoint, kind and type, in a format of tabulate."""
    keys = list(dict.fromkeys((r["checkpoint"], r["kind"], r["dtype"]) for r in results))
    rows = []
    for key in keys:
        group = [r for r in results if (r["checkpoint"], r["kind"], r["dtype"]) == key]
        cells = []
        for column in ("search", "held_out"):
            ratios = [one[column] for one in group]
            cells += [f"{sum(ratios) / len(ratios):.3f}", f"{max(ratios):.3f}"]
        seconds = [one["seconds"] for one in group]
        cells += [f"{sum(seconds) / len(seconds):.2f}", f"{max(seconds):.2f}"]
        rows.append([*key, len(group), *cells])
    headers = ["checkpoint", "kind", "type", "groups", "search", "worst", "held-out", "worst",
               "s a group", "most"]  # fmt: skip
    return str(tabulate(rows, headers=headers, tablefmt=form, disable_numparse=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=subjects.NAMES, metavar="t2v|i2v")
    parser.add_argument("--videos", type=int, default=4, help="to calibrate on")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--stride", type=int, default=5, help="one group of so many")
    parser.add_argument("--points", type=int, default=21, help="values of each exponent")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    results = [one for name in options.names for one in measure(name, options)]
    print(record.write(options.out, "exhaustive", record.settings(options), results))
    print(table(results))


if __name__ == "__main__":
    main()
