"""Whether compiled models still show what they were asked for, and how near the originals they are.

    python -m benchmarks.recognition [--count 10]

Each trained checkpoint makes the same videos in fp32 and compiled by each recipe, from the same
seeds. A classifier names their digits; PSNR and SSIM compare a compiled model's videos with those
of the original. A GPU is used where there is one; without one, ask for few videos.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import wancompile
from benchmarks import record, subjects
from training.classifier import Classifier
from wancompile.demo.quality import psnr, ssim
from wancompile.demo.sampler import Request, calls, sample
from wancompile.recipe import RECIPES

_WORST = 0.05


def measure(name: str, classifier: Classifier, options: argparse.Namespace) -> dict[str, Any]:
    """Return what one checkpoint's videos show, as it is and compiled by each recipe."""
    model = subjects.load(name)
    shown = subjects.calibration(name, options.calibration_videos, options.calibration_steps)
    data = calls(model, [shown])
    stats = wancompile.calibrate(model, data)
    asked, labels = subjects.held_out(name, options.count, options.steps)
    originals = in_batches(model, asked, options.batch)
    recipes: dict[str, Any] = {}
    for recipe in options.recipes:
        compiled = wancompile.compile(model, recipe=recipe, stats=stats, example_inputs=data[0])
        videos = in_batches(compiled, asked, options.batch)
        likeness = {"psnr": psnr(videos, originals), "ssim": ssim(videos, originals)}
        recipes[recipe] = {
            **_recognised(classifier, videos, labels),
            **{key: spread(values) for key, values in likeness.items()},
        }
    return {
        "checkpoint": name,
        "asked": labels.tolist(),
        "original": _recognised(classifier, originals, labels),
        "recipes": recipes,
    }


def in_batches(model: Any, asked: Request, size: int) -> Tensor:
    """Return the videos of a request, sampled `size` at a time."""
    starts = range(0, len(asked.prompts), size)
    return torch.cat([sample(model, subjects.part(asked, start, size)) for start in starts])


def _recognised(classifier: Classifier, videos: Tensor, labels: Tensor) -> dict[str, Any]:
    named = classifier(videos)
    return {"recognised": float((named == labels).float().mean()), "named": named.tolist()}


def spread(values: Tensor) -> dict[str, Any]:
    """Return the mean, and the mean of the worst twentieth, or of the worst one of a few."""
    worst = values.sort().values[: max(1, int(_WORST * len(values)))]
    return {"mean": float(values.mean()), "worst": float(worst.mean()), "each": values.tolist()}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each checkpoint and recipe."""
    headers = ["checkpoint", "recipe", "recognised", "PSNR", "worst 5 %", "SSIM", "worst 5 %"]
    return tabulate(list(_rows(results)), headers=headers, disable_numparse=True)


def _rows(results: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for one in results:
        name = one["checkpoint"]
        yield [name, "original", _percent(one["original"]["recognised"]), *"----"]
        for recipe, found in one["recipes"].items():
            decibels = [f"{found['psnr'][how]:.1f} dB" for how in ("mean", "worst")]
            likeness = [f"{found['ssim'][how]:.4f}" for how in ("mean", "worst")]
            yield [name, recipe, _percent(found["recognised"]), *decibels, *likeness]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    usual = Request(())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=subjects.NAMES, metavar="t2v|i2v")
    parser.add_argument("--count", type=int, default=100, help="videos, digit after digit")
    parser.add_argument("--batch", type=int, default=50, help="videos sampled at a time")
    parser.add_argument("--steps", type=int, default=usual.steps)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--calibration-videos", type=int, default=4)
    parser.add_argument("--calibration-steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    options = parser.parse_args(argv)
    classifier = Classifier()
    results = [measure(name, classifier, options) for name in options.names]
    print(record.write(options.out, "recognition", record.settings(options), results))
    print(table(results))


if __name__ == "__main__":
    main()
