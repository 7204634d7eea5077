"""Whether errors of single sites add up, and what they cost to find.

    python -m benchmarks.sensitivity

For each trained checkpoint, as it is and with outlier channels: the error at the end of the model
with everything in 8 bits over the root of the sum of squares of the errors of single sites, and how
well the cheap error, which the search for a smooth scale has found on sampled tokens, ranks groups
by the error that they cause at the end. And what sensitivities of a 14B model would take.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import wancompile
from benchmarks import record, subjects
from wancompile import presets
from wancompile.cost import costs
from wancompile.demo.sampler import calls
from wancompile.recipe import ATTENTIONS, Recipe
from wancompile.sensitivity import Sensitivity, SiteSensitivity

KINDS = ("original", "outliers")
_BIG = "t2v-14b"


def measure(name: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the sensitivities of one checkpoint, their sum, and how cheap errors rank them."""
    model = subjects.load(name)
    shown = calls(model, [subjects.calibration(name, options.videos, options.steps)])
    asked, _ = subjects.held_out(name, 1, options.steps)
    held_out = calls(model, [asked])
    # One step in the middle, with the prompt and without.
    middle = len(held_out) // 4 * 2
    subject = subjects.with_outliers(model) if kind == "outliers" else model
    stats = wancompile.calibrate(subject, shown)
    program = wancompile.trace(subject, shown[0])
    found = wancompile.sensitivity(program, held_out[middle : middle + 2], stats, progress=True)
    return {
        "checkpoint": name,
        "kind": kind,
        "together": [
            {
                **asdict(one),
                "ratio": one.error / one.predicted,
                "rank": rank_correlation(found, ATTENTIONS[one.dtype].dtype),
            }
            for one in found.together
        ],
        "trials": len(found.sites),
        "calls": found.calls,
        "forwards": found.forwards,
        "seconds": found.seconds,
        "sites": [asdict(one) for one in found.sites],
    }


def rank_correlation(found: Sensitivity, dtype: str) -> float:
    """Return Spearman's correlation of the search's errors of groups with those at the end."""
    groups = [one for one in found.sites if one.dtype == dtype and one.calibrated is not None]
    pairs = _ranks([_cheap(one) for one in groups]), _ranks([one.error for one in groups])
    return float(torch.corrcoef(torch.stack(pairs))[0, 1])


def _cheap(one: SiteSensitivity) -> float:
    assert one.calibrated is not None
    return one.calibrated


def _ranks(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def estimate(layers: int = 40, latent: presets.Latent = (21, 30, 52)) -> dict[str, Any]:
    """Return what sensitivities of a 14B model take on one call, by the cost model; not measured.

    Video of 81 frames at half the width and height of 480p. A trial is half a forward in bf16.
    """
    subject = replace(presets.truncated(presets.find(_BIG), 1), latent=latent)
    call = presets.example_inputs(subject, device="meta")
    program = wancompile.trace(presets.build(subject, device="meta"), call, dynamic=False)
    found = costs(program)
    trials = layers * sum(len(ATTENTIONS.keys() & one.ms) for one in found.sites)
    forward = layers * found.of(Recipe("float", None), program.groups) / 1e3
    return {
        "preset": _BIG,
        "tokens": found.tokens,
        "trials": trials,
        "forward_s": forward,
        "seconds": forward * trials / 2,
    }


def rows(results: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield a line for each checkpoint, kind and type."""
    for one in results:
        for each in one["together"]:
            yield [
                one["checkpoint"],
                one["kind"],
                each["dtype"],
                f"{100 * each['error']:.3f} %",
                f"{100 * each['predicted']:.3f} %",
                f"{each['ratio']:.2f}",
                f"{each['rank']:.2f}",
                f"{one['trials'] * one['calls']}",
                f"{one['forwards']:.0f}",
                f"{one['seconds']:.0f}",
            ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=subjects.NAMES, metavar="t2v|i2v")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--videos", type=int, default=2, help="to calibrate on")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    checkpoints = [measure(name, kind, options) for name in options.names for kind in options.kinds]
    big = estimate()
    results = {"checkpoints": checkpoints, "estimate": big}
    print(record.write(options.out, "sensitivity", record.settings(options), results))
    headers = ["checkpoint", "kind", "type", "all", "predicted", "ratio", "rank", "trials"]
    headers += ["forwards", "s"]
    print(tabulate(list(rows(checkpoints)), headers=headers, disable_numparse=True))
    print(
        f"{big['preset']}, {big['tokens']:,} tokens, {big['trials']} trials: "
        f"{big['seconds']:.0f} s a call on an H100, by the cost model"
    )


if __name__ == "__main__":
    main()
